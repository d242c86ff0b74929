"""What a random model is made of: expressions of values `x` and `y`, grouped by kind, the simplest first.

n: the batch. c: x's second size, h and w: its last two; none of them may depend on the batch. What follows `self.` is
a parameter or a layer of `PARAMETERS`, of the sizes that x needs.
"""

from __future__ import annotations

from typing import NamedTuple

PARAMETERS = {
    "slope": "nn.Parameter(torch.tensor(0.2))",
    "scale": "positive({c})",
    "shift": "weight({c})",
    "mean": "weight({c})",
    "variance": "positive({c})",
    "kernel": "weight({o}, {c}, {k}, {k})",
    "bias": "weight({o})",
    "square": "weight({c}, {c}, 1, 1)",
    "transposed": "weight({c}, {o}, {k}, {k})",
    "matrix": "weight({o}, {w})",
    "layer": "nn.Linear({w}, {o})",
    "conv": "nn.Conv2d({c}, {geometry})",
    "unbatched": "nn.Conv2d({first}, {o}, {k})",
}
"""o, k: any number of results, any size of a kernel; `geometry`: all that a `nn.Conv2d` takes after its channels."""


class Kind(NamedTuple):
    share: int
    """How often it is drawn, relative to others."""
    dims: tuple[int, ...]
    """How many dimensions x may have; any number if empty."""
    text: str
    """The expressions, with a semicolon between two of them."""
    results: int = 1

    @property
    def expressions(self) -> list[str]:
        return [" ".join(each.split()) for each in self.text.split(";")]


KINDS = {
    "convolution": Kind(
        10,
        (4,),
        """
        self.{conv}({x})
        """,
    ),
    "convolution of one image": Kind(
        1,
        (3,),
        """
        self.{unbatched}({x})
        """,
    ),
    "convolution with a kernel": Kind(
        3,
        (4,),
        """
        F.conv2d({x}, self.{kernel}); F.conv2d({x}, self.{kernel}, padding='same');
        F.conv2d({x}, self.{kernel}, self.{bias}, 1, 'valid'); F.conv2d({x}, self.{kernel}, None, (1, 2), (1,), [1]);
        F.conv2d({x}, self.{kernel} * 2, self.{bias}, 2, 1); F.conv2d({x}, self.{kernel}.clone(), None, 1, 1, 2);
        F.conv2d({x}, self.{kernel}.flip(-1)); F.conv2d({x}, self.{kernel}.mean((2, 3), keepdim=True));
        F.conv2d({x}, self.{kernel}.contiguous(memory_format=torch.channels_last), padding=1);
        F.conv2d({x}, self.{kernel}.transpose(2, 3), padding=1); F.conv2d({x}, self.{kernel}[..., :1]);
        F.conv2d({x}, self.{kernel} - self.{kernel}.mean((1, 2, 3), keepdim=True), padding=1);
        F.conv2d({x}, F.pad(self.{kernel}, (0, 1))); F.conv2d({x}, torch.cat([self.{kernel}, self.{kernel}]));
        F.conv2d({x}, self.{kernel}, self.{kernel}.sum((1, 2, 3))); F.conv2d({x}, self.{kernel}[:, :1], groups={c});
        F.conv2d({x}, self.{kernel}.expand(-1, -1, 3, 3)); F.conv2d({x}, self.{kernel}[:, :, 1:2, 1:2], self.{bias})
        """,
    ),
    "convolution with a kernel made in forward": Kind(
        2,
        (4,),
        """
        F.conv2d({x}, {x}.new_ones({c}, 1, 3, 3) / 9, groups={c}, padding=1);
        F.conv2d({x}, {x}.new_full((2, {c}, 1, 1), 0.25)); F.conv2d({x}, torch.ones({c}, 1, 3, 3) / 9, groups={c});
        F.conv2d({x}, torch.eye({c})[:, :, None, None]); F.conv2d({x}, {x}[:1, :, :2, :2] / 8);
        F.conv2d({x}.reshape(1, -1, {h}, {w}), self.{kernel}.repeat(n, 1, 1, 1), groups=n);
        F.conv2d({x}, self.{kernel} * {x}.mean()); F.conv2d({x}, self.{kernel}, padding=n)
        """,
    ),
    "other convolution": Kind(
        2,
        (4,),
        """
        F.conv1d({x}.flatten(2), self.{kernel}.flatten(2)[..., :3], padding=1);
        F.conv3d({x}[:, :, None], self.{kernel}[:, :, None], padding=[0, 1, 1]);
        F.conv_transpose2d({x}, self.{transposed});
        F.conv_transpose2d({x}, self.{transposed}, stride=2, output_padding=1);
        F.conv2d({x}[0], self.{kernel}, padding='same')
        """,
    ),
    "activation": Kind(
        6,
        (),
        """
        F.relu({x}); F.silu({x}); torch.sigmoid({x}); F.gelu({x}); F.gelu({x}, approximate='tanh'); F.relu6({x});
        F.hardswish({x}); F.hardsigmoid({x}); F.leaky_relu({x}); F.leaky_relu({x}, 1); F.leaky_relu({x}, 1 / (1 + n));
        F.hardtanh({x}, -0.5, 2); {x}.clamp(min=-0.25); {x}.clamp(max=0.5); {x}.clamp(-1, 1); torch.tanh({x});
        F.elu({x}); F.softplus({x}); F.mish({x}); F.selu({x}); -{x}; {x}.abs(); F.softmax({x}, -1); F.softmax({x}, 1);
        F.logsigmoid({x}); F.threshold({x}, 0.1, 0.1); F.prelu({x}, self.{slope});
        F.dropout({x}, 0.5, training=False); torch.where({x} > 0, {x}, 0.1 * {x}); F.relu({x}) ** 2;
        {x} * F.relu6({x} + 3) / 6; {x} * torch.sigmoid({x}); F.glu({x}, 1); {x}.exp().log(); F.celu({x}, 0.5);
        F.hardshrink({x} * 0); {x}.clamp(self.{slope}, self.{slope} + 1)
        """,
    ),
    "arithmetic with a number": Kind(
        2,
        (),
        """
        {x} + 1; {x} * 0.5; 2 - {x}; {x} / 3; {x} * n; {x} / (n + 1); {x} + n; 1 + {x} * {x}; {x}.add({x}, alpha=2);
        {x}.add(1, alpha=2); torch.rsub({x}, 1); {x} * self.{slope}; {x} - {x}
        """,
    ),
    "written to": Kind(
        4,
        (),
        """
        {x}.relu_(); {x}.mul_(0.5); {x}.add_(1); F.relu({x}, inplace=True); F.silu({x}, inplace=True);
        F.hardtanh({x}, inplace=True); F.leaky_relu({x}, 0.2, inplace=True); {x}.clamp_(min=0); {x}.sigmoid_();
        {x}.masked_fill_({x} < 0, 0.0); {x}.neg_(); F.hardswish({x}, inplace=True); {x}.fill_(0.5); {x}.zero_();
        {x}[:1].mul_(2); {x}[:, :1].add_(1); {x}[..., 1:].neg_(); {x}.select(-1, 0).zero_(); {x}.sub_(0.25);
        {x}.view(n, -1).mul_(2); {x}.transpose(0, 1).add_(0.5); {x}.detach().mul_(2); F.elu({x}, inplace=True);
        {x}.copy_({y}); {x}.add_({y}); {x}.mul_({y}); {x}.sub_({y}, alpha=2); {x}[:, :1].copy_({x}[:, -1:]);
        {x}[:, 1:].add_({y}[:, 1:]); {x}.diagonal(0, -1, -2).add_(1); {x}.index_fill_(1, torch.tensor([0]), 0.5);
        {x}.index_put_((torch.tensor([0]),), {y}[0]); {x}.index_add_(1, torch.tensor([0]), {x}[:, -1:].clone());
        {x}.masked_scatter_({x} > 0, {y}.clone()); {x}.scatter_(-1, torch.zeros_like({x}, dtype=torch.int64), 0.5);
        {x}[:, 1:][..., 0].mul_(2)
        """,
    ),
    "copy with a part replaced": Kind(
        2,
        (),
        """
        torch.slice_scatter({x}, {y}[:, 1:], 1, 1); {x}.select_scatter({y}[..., 0], -1, 0);
        {x}.masked_fill({x} < 0, 0.0); {x}.index_fill(1, torch.tensor([0]), 0.5);
        {x}.slice_scatter({x}[:, 1:] * 2, 1, 1); {x}.diagonal_scatter({x}.diagonal(0, -1, -2) + 1, 0, -1, -2);
        {x}.index_put((torch.tensor([0]),), {y}[0]); {x}.slice_scatter({x}[:, :-1], 1, 1)
        """,
    ),
    "copy": Kind(
        3,
        (),
        """
        {x}.clone(); {x}.contiguous(); {x}.contiguous(memory_format=torch.channels_last); {x}.detach();
        {x}.to(memory_format=torch.channels_last); {x}.clone(memory_format=torch.contiguous_format);
        {x}.clone(memory_format=torch.channels_last); torch.zeros_like({x}); {x} + torch.ones_like({x});
        torch.empty_like({x}).copy_({x}); {x}.to(torch.get_default_dtype()); {x}.view_as({x})
        """,
    ),
    "view": Kind(
        6,
        (),
        """
        {x}.flatten(1); {x}.view(n, -1); {x}.reshape(n, -1); {x}.flatten(2); {x}.transpose(1, 2);
        {x}.transpose(-1, -2); {x}.transpose(0, 1); {x}[:, :1]; {x}[:, 1:]; {x}[:, ::2]; {x}[..., :-1]; {x}[:1];
        {x}[-1:]; {x}[0]; {x}[:, 0]; {x}[..., 0]; {x}[:, :0]; {x}[:, None]; {x}[..., None]; {x}[:, :, None, None];
        {x}.unsqueeze(0); {x}.squeeze(); {x}.squeeze(1); {x}.squeeze(-1); {x}.unflatten(1, (2, -1));
        {x}.unflatten(1, (-1, 1, 1)); {x}.flatten(0, 1); {x}.movedim(1, -1); {x}.mT; {x}.view(-1);
        {x}.narrow(1, 0, 1); {x}.expand_as({y}); {y}.view_as({x}); {x}.view(n, {c}, -1); {x}.view(n, {c}, 1, -1);
        {x}.reshape(1, 1, -1, {c})
        """,
    ),
    "view of a map": Kind(
        4,
        (4,),
        """
        {x}.permute(0, 2, 3, 1); {x}.permute(0, 3, 1, 2); {x}.permute(1, 0, 2, 3); {x}[:, :, 1:]; {x}[:, :, ::2];
        {x}[:, :, ::2, ::2]; {x}.squeeze((2, 3)); {x}.expand(-1, 4, -1, -1); {x}.expand(n, -1, 3, 3);
        {x}.reshape(n, 2, -1, {h}, {w}); {x}.reshape(1, -1, {h}, {w}); {x}.reshape(n, -1, 1, 1); {x}[:, :, :1, :1]
        """,
    ),
    "moved": Kind(
        2,
        (4,),
        """
        {x}.roll(1, 1); {x}.flip(-1); {x}.repeat(1, 2, 1, 1); F.pad({x}, (1, 1, 1, 1)); F.pixel_shuffle({x}, 2);
        F.pad({x}, (1, 2, 0, 0), mode='reflect'); F.pad({x}, (0, 1, 2, 0), mode='replicate');
        F.pad({x}, (1, 1, 0, 0), value=0.5); F.pad({x}, (0, -1)); F.pixel_unshuffle({x}, 2);
        F.channel_shuffle({x}, 2); {x}.repeat_interleave(2, 1); torch.tril({x}); {x}.cumsum(-1);
        torch.stack([{x}[:, 0], {x}[:, -1]], 1); {x}.sort(-1)[0]; {x}.rot90(1, (2, 3)); F.unfold({x}, 2);
        F.grid_sample({x}, {x}[:, :2].permute(0, 2, 3, 1), align_corners=False);
        {x}.view(n, 2, {c} // 2, {h}, {w}).transpose(1, 2).reshape(n, {c}, {h}, {w})
        """,
    ),
    "reduction": Kind(
        2,
        (4,),
        """
        {x}.mean((2, 3)); {x}.mean((2, 3), keepdim=True); {x}.mean((-1, -2), True); {x}.mean(1);
        {x}.mean(1, keepdim=True); {x}.sum((2, 3)); {x}.sum(1, keepdim=True); {x}.amax((2, 3), keepdim=True);
        {x}.amax(1); {x}.mean(2); {x}.mean(3, keepdim=True); {x}.mean((1, 2, 3)); {x}.mean();
        {x}.var((2, 3), unbiased=False); {x}.norm(dim=1, keepdim=True); {x}.logsumexp(1); {x}.mean(0, keepdim=True);
        {x}.max(1, keepdim=True)[0]; {x}.mean([0, 2, 3], keepdim=True)
        """,
    ),
    "pooling": Kind(
        3,
        (4, 3),
        """
        F.max_pool2d({x}, 2); F.max_pool2d({x}, 3, 2, 1); F.max_pool2d({x}, (3, 2), (1, 2), (1, 0));
        F.max_pool2d({x}, 3, 1, 1, 1); F.max_pool2d({x}, 2, 2, 0, 2); F.max_pool2d({x}, 3, 2, ceil_mode=True);
        F.max_pool2d({x}, 2, return_indices=True)[0]; F.avg_pool2d({x}, 2); F.avg_pool2d({x}, 3, 2, 1);
        F.avg_pool2d({x}, 3, 1, 1, False, False); F.avg_pool2d({x}, 3, 2, 1, True); F.avg_pool2d({x}, (1, 3));
        F.avg_pool2d({x}, 2, divisor_override=3); F.avg_pool2d({x}, 3, 3, 1, True, False);
        F.adaptive_avg_pool2d({x}, 1); F.adaptive_avg_pool2d({x}, 2); F.adaptive_avg_pool2d({x}, (3, 5));
        F.adaptive_avg_pool2d({x}, ({h}, {w})); F.adaptive_avg_pool2d({x}, (None, 1)); F.adaptive_avg_pool2d({x}, 7);
        F.adaptive_max_pool2d({x}, 1); F.adaptive_max_pool2d({x}, (2, 3)); F.lp_pool2d({x}.abs() + 1, 2, 2)
        """,
    ),
    "interpolation": Kind(
        2,
        (4,),
        """
        F.interpolate({x}, scale_factor=2); F.interpolate({x}, scale_factor=2, mode='bilinear');
        F.interpolate({x}, (7, 5)); F.interpolate({x}, (7, 9), mode='bilinear', align_corners=True);
        F.interpolate({x}, scale_factor=0.5); F.interpolate({x}, scale_factor=(1, 3), mode='nearest-exact');
        F.interpolate({x}, 6, mode='bicubic'); F.interpolate({x}, (3, 3), mode='area');
        F.interpolate({x}, scale_factor=1.5, mode='bilinear'); F.interpolate({x}, ({h}, {w}));
        F.interpolate({x}, (1, 1), mode='bilinear'); F.interpolate({x}, (4, 4), mode='bilinear', antialias=True)
        """,
    ),
    "norm": Kind(
        4,
        (4, 3),
        """
        F.batch_norm({x}, self.{mean}, self.{variance}, self.{scale}, self.{shift});
        F.batch_norm({x}, self.{mean}, self.{variance});
        F.relu(F.batch_norm({x}, self.{mean}, self.{variance}, self.{scale}, self.{shift}, eps=0.1));
        F.group_norm({x}, 1, self.{scale}, self.{shift}); F.group_norm({x}, 2); F.group_norm({x}, {c});
        F.instance_norm({x}); F.layer_norm({x}, ({c}, {h}, {w})); F.layer_norm({x}, ({w},)); F.normalize({x});
        F.local_response_norm({x}, 2); F.batch_norm({x}, None, None, training=True); F.rms_norm({x}, ({w},));
        {x} * self.{scale}.view(-1, 1, 1) + self.{shift}.view(-1, 1, 1); {x} * self.{scale}[:, None, None];
        {x} + self.{shift}[None, :, None, None]; F.silu(F.group_norm({x}, 1));
        F.layer_norm({x}.permute(0, 2, 3, 1), ({c},), self.{scale}, self.{shift}).permute(0, 3, 1, 2)
        """,
    ),
    "excitation": Kind(
        2,
        (4,),
        """
        {x} * torch.sigmoid(F.conv2d({x}.mean((2, 3), keepdim=True), self.{square}));
        {x} * torch.sigmoid(F.linear({x}.mean((2, 3)), self.{square}.flatten(1))).view(n, {c}, 1, 1);
        {x} * F.hardsigmoid(F.conv2d(F.adaptive_avg_pool2d({x}, 1), self.{square}));
        {x} * torch.sigmoid({x}.mean(1, keepdim=True)); {x} + F.conv2d({x}, self.{square});
        F.relu({x} + F.conv2d({x}, self.{square}));
        {x} * torch.sigmoid({x}.amax((2, 3), True) + {x}.mean((2, 3), True))
        """,
    ),
    "pair": Kind(
        6,
        (),
        """
        {x} + {y}; {x} * {y}; {x} - {y}; torch.maximum({x}, {y}); {x}.add({y}, alpha=0.5); F.relu({x} + {y});
        {x} / (1 + {y}.abs()); {x} * torch.sigmoid({y}); torch.lerp({x}, {y}, 0.25); {x} + {y}.expand_as({x});
        torch.addcmul({x}, {x}, {y}); torch.minimum({x}, {y}).add_(1); torch.add({y}, {x}); {y} + {x}
        """,
    ),
    "concatenation": Kind(
        4,
        (),
        """
        torch.cat([{x}, {y}], 1); torch.cat([{x}, {x}], 1); torch.cat([{x}, {y}, {x}], 1); torch.cat([{x}, {y}], 0);
        torch.cat([{x}, {y}], -1); torch.cat([{x}, {y}], 2); torch.stack([{x}, {y}], 1); torch.cat([{x}], 1);
        torch.cat([{x}, {y}], -3); torch.stack([{x}, {y}]).sum(0); torch.cat([{y}[:, :0], {x}], 1);
        torch.cat([{x}, F.relu({y})], 1); torch.cat(({y}, {x}), dim=1)
        """,
    ),
    "split": Kind(
        2,
        (),
        """
        {x}.chunk(2, 1); {x}.split(1, 1)[:2]; {x}.chunk(2, -1); {x}.tensor_split(2, 1); {x}[:, ::2], {x}[:, 1::2];
        {x}.split([1, {c} - 1], 1); {x}.unbind(1)[:2]; {x}.chunk(2, 0); {x}[:1], {x}[1:]
        """,
        results=2,
    ),
    "linear": Kind(
        3,
        (2, 3, 4),
        """
        self.{layer}({x}); F.linear({x}, self.{matrix}, self.{bias}); F.linear({x}, self.{matrix});
        {x} @ self.{matrix}.t(); F.relu(self.{layer}({x})); F.gelu(self.{layer}({x})); self.{layer}({x}).relu_();
        F.linear({x}, self.{matrix} * 2, self.{bias}); torch.einsum('...i,oi->...o', {x}, self.{matrix});
        F.linear({x}, {x}.reshape(-1, {w})[:3])
        """,
    ),
    "product of matrices": Kind(
        1,
        (3, 4),
        """
        F.softmax({x} @ {x}.transpose(-1, -2) / 4, -1) @ {x}; {x} @ {x}.transpose(-1, -2) / 8;
        F.scaled_dot_product_attention({x}, {x}, {x})
        """,
    ),
}
