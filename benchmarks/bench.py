"""What every measurement shares: the work folder, its releases, and how commands are spelled."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.process import run
from benchmarks.series import Contender, Series, in_turn, remove

Words = Sequence[str | Path]
SMALL_BYTES = 0.12e9
"""Source of warm-up runs, which compile kernels and fetch programs from the disk."""


@dataclass(slots=True, kw_only=True)
class Bench:
    """One run of the benchmark."""

    work: Path
    """Emptied and filled at will."""
    size: float
    """Bytes of the main release."""
    slow_size: float
    """Bytes of the release for modes in which the stock side takes a minute for a gigabyte."""
    rounds: int
    large: bool
    timeout: float
    _made: dict[str, Path] = field(default_factory=dict)

    def say(self, line: str) -> None:
        """Progress, to stderr."""
        print(line, file=sys.stderr, flush=True)

    def release(self) -> Path:
        """The main release: random bf16 weights."""
        return self._release("source", "--bytes", f"{self.size:.0f}")

    def slow_release(self) -> Path:
        """The main release, or a smaller one if the user asked for that."""
        if self.slow_size == self.size:
            return self.release()
        return self._release("slow", "--bytes", f"{self.slow_size:.0f}")

    def warm_up(self, *flags: str, programs: Sequence[str] = ()) -> None:
        """Run this converter and the stock ``programs`` once on something small."""
        source = self._release("small", "--bytes", f"{SMALL_BYTES:.0f}")
        contenders = [self.ours("warm-up", source, *flags)]
        contenders += [self.stock(program, source, *flags) for program in programs]
        self.compete(contenders, rounds=1)
        for contender in contenders:
            remove(contender.out)

    def zero_release(self, size: float) -> Path:
        """A release of ``size`` bytes of zeros, which takes no disk."""
        return self._release(f"zeros-{size / 1e9:g}", "--bytes", f"{size:.0f}", "--zeros")

    def wide_release(self, tensors: int) -> Path:
        """A release of at least ``tensors`` tensors, all holes."""
        return self._release("wide", "--tensors", str(tensors))

    def compete(self, contenders: Sequence[Contender], *, rounds: int = 0) -> dict[str, Series]:
        """The contenders in turn, ``rounds`` times (default: as the user asked)."""
        return in_turn(
            contenders,
            rounds=rounds or self.rounds,
            log=self.work / "log.txt",
            timeout=self.timeout,
            say=self.say,
        )

    def ours(self, name: str, source: Path, *flags: str) -> Contender:
        """This converter, without the parity report: stock converters have none either."""
        out = self.work / f"out-{name}"
        asked = ("--hf-path", source, "--mlx-path", out, "--no-validate", "--quiet")
        return Contender(name=name, command=(tool("convert"), *asked, *flags), out=out)

    def stock(self, program: str, source: Path, *flags: str) -> Contender:
        """A stock converter (``mlx_lm`` or ``mlx_vlm``) as its users run it."""
        out = self.work / f"out-{program}"
        asked = ("--hf-path", source, "--mlx-path", out)
        return Contender(
            name=program, command=(tool(f"{program}.convert"), *asked, *flags), out=out
        )

    def floor(self, name: str, source: Path, size: int) -> Contender:
        """The I/O floor: ``source``'s weights read once, ``size`` bytes written and flushed."""
        out = self.work / "floor.bin"
        files = sorted(source.glob("*.safetensors"))
        command: Words = (sys.executable, "-m", "benchmarks.floor", out, str(size), *files)
        return Contender(name=name, command=command, out=out)

    def module(self, name: str, *arguments: str | Path) -> str:
        """What a helper module of this package prints, run as a process of its own."""
        command = (sys.executable, "-m", f"benchmarks.{name}", *arguments)
        return run(command, log=self.work / "log.txt", timeout=self.timeout).output

    def _release(self, name: str, *flags: str) -> Path:
        if name not in self._made:
            folder = self.work / name
            self.say(f"making {folder}")
            remove(folder)
            self.module("checkpoint", folder, *flags)
            warm(folder)
            self._made[name] = folder
        return self._made[name]


def warm(folder: Path) -> None:
    """Read weights once, so that every contender finds them in the page cache; holes stay."""
    buffer = bytearray(8 << 20)
    for path in folder.glob("*.safetensors"):
        if path.stat().st_blocks * 512 < path.stat().st_size:
            continue
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def weight_bytes(folder: Path) -> int:
    """Bytes of the weight files of a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def tool(name: str) -> Path:
    """A console script of the environment that runs this."""
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        raise SystemExit(f"{path}: not installed; run `pip install -e .` in this environment")
    return path
