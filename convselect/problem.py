"""`ConvProblem`: the geometry of one two-dimensional convolution, printed and parsed in one grammar."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from functools import cached_property

_LETTERS = ("mb", "_g", "ic", "ih", "iw", "oc", "oh", "ow", "kh", "kw", "sh", "sw", "ph", "pw", "dh", "dw")
_TEXT = re.compile("".join(rf"{letters}(?P<{letters.lstrip('_')}>\d+)" for letters in _LETTERS))


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Output pixels along one dimension; the formula of `torch.nn.Conv2d`."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


@dataclass(frozen=True, kw_only=True)
class ConvProblem:
    """A convolution of `src [mb, ic, ih, iw]` with `weight [oc, ic/g, kh, kw]` giving `dst [mb, oc, oh, ow]`.

    The letters are benchdnn's. Dilation is torch's (1 = none). `ic` and `oc` count all groups.
    """

    mb: int = 1
    g: int = 1
    ic: int
    ih: int
    iw: int
    oc: int
    kh: int
    kw: int
    sh: int = 1
    sw: int = 1
    ph: int = 0
    pw: int = 0
    dh: int = 1
    dw: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("ph", "pw") else 1
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{field.name} is {value!r}, must be an integer of at least {least}")
        if self.ic % self.g or self.oc % self.g:
            raise ValueError(f"g is {self.g}, must divide ic={self.ic} and oc={self.oc}")
        if self.oh < 1 or self.ow < 1:
            raise ValueError(
                f"the kernel {self.kh}x{self.kw} (dilation {self.dh}x{self.dw}) does not fit "
                f"into {self.ih}x{self.iw} padded by {self.ph}x{self.pw}"
            )

    @cached_property
    def oh(self) -> int:
        return output_size(self.ih, self.kh, self.sh, self.ph, self.dh)

    @cached_property
    def ow(self) -> int:
        return output_size(self.iw, self.kw, self.sw, self.pw, self.dw)

    @property
    def flops(self) -> int:
        """Floating-point operations of the direct algorithm, two for each multiply-add."""
        return 2 * self.mb * self.oc * self.oh * self.ow * (self.ic // self.g) * self.kh * self.kw

    @property
    def src_bytes(self) -> int:
        return 4 * self.mb * self.ic * self.ih * self.iw

    @property
    def dst_bytes(self) -> int:
        return 4 * self.mb * self.oc * self.oh * self.ow

    @property
    def weight_bytes(self) -> int:
        return 4 * self.oc * (self.ic // self.g) * self.kh * self.kw

    @property
    def is_depthwise(self) -> bool:
        """One filter a channel: g == ic == oc > 1."""
        return self.g > 1 and self.g == self.ic == self.oc

    @cached_property
    def geometry(self) -> list[int]:
        """What a kernel needs beside `src`'s sizes: oc kh kw sh sw ph pw dh dw g."""
        return [self.oc, self.kh, self.kw, self.sh, self.sw, self.ph, self.pw, self.dh, self.dw, self.g]

    def with_batch(self, mb: int) -> ConvProblem:
        return replace(self, mb=mb)

    def __str__(self) -> str:
        return (
            f"mb{self.mb}_g{self.g}ic{self.ic}ih{self.ih}iw{self.iw}oc{self.oc}oh{self.oh}ow{self.ow}"
            f"kh{self.kh}kw{self.kw}sh{self.sh}sw{self.sw}ph{self.ph}pw{self.pw}dh{self.dh}dw{self.dw}"
        )

    @classmethod
    def parse(cls, text: str) -> ConvProblem:
        """The inverse of `str`. Raises `ValueError` where `text` is not in the grammar or contradicts itself."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ValueError(
                f"{text!r} is not a problem; one reads mb1_g1ic64ih56iw56oc64oh56ow56kh3kw3sh1sw1ph1pw1dh1dw1"
            )
        sizes = {name: int(value) for name, value in match.groupdict().items()}
        oh, ow = sizes.pop("oh"), sizes.pop("ow")
        problem = cls(**sizes)
        if (problem.oh, problem.ow) != (oh, ow):
            raise ValueError(f"{text!r} gives the output {oh}x{ow}, but its geometry gives {problem.oh}x{problem.ow}")
        return problem


DIMENSIONS = tuple(field.name for field in fields(ConvProblem))
"""mb g ic ih iw oc kh kw sh sw ph pw dh dw: the columns of a table of problems."""
