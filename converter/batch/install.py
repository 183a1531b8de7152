"""What makes a machine run a watch list every night: a systemd timer, a launchd plist, cron."""

from __future__ import annotations

import os
import plistlib
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from converter.batch.site import state_folder
from converter.errors import UsageError

NAME: Final = "mlx-dayzero-nightly"
_LABEL: Final = "mlx-dayzero.nightly"
_TIME: Final = re.compile(r"([01]\d|2[0-3]):([0-5]\d)")
STOP_S: Final = 120
"""Seconds between SIGTERM and SIGKILL; uploads get one minute to end."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Files to write, and the command that turns them on."""

    files: dict[Path, str]
    then: str


def default_kind() -> str:
    """What this machine schedules with."""
    if sys.platform == "darwin":
        return "launchd"
    return "systemd" if Path("/run/systemd/system").is_dir() else "cron"


def schedule(watchlist: Path, *, state: Path | None, at: str, kind: str) -> Schedule:
    """The schedule of a nightly run; UsageError when ``at`` is no time of day."""
    time = _TIME.fullmatch(at)
    if time is None:
        raise UsageError(f"--at {at}: is not a time of day such as 02:30")
    hour, minute = int(time.group(1)), int(time.group(2))
    command = [*_program(), "batch", "run", str(watchlist.resolve()), "--quiet"]
    if state is not None:
        command += ["--state", str(state_folder(state).resolve())]
    if kind == "systemd":
        return _systemd(command, hour, minute)
    if kind == "launchd":
        return _launchd(command, hour, minute)
    return _cron(command, hour, minute)


def write_files(plan: Schedule) -> list[Path]:
    """Write a schedule's files; UsageError for one that is to be added to by hand."""
    if any(str(path) == "crontab" for path in plan.files):
        raise UsageError("--write: a crontab is changed with `crontab -e`; add the printed line")
    for path, text in plan.files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(plan.files)


def _program() -> list[str]:
    beside = Path(sys.executable).with_name("convert")
    if beside.is_file() and os.access(beside, os.X_OK):
        return [str(beside)]
    return [sys.executable, "-m", "converter"]


def _systemd(command: list[str], hour: int, minute: int) -> Schedule:
    words = " ".join(_systemd_word(word) for word in command)
    service = f"""[Unit]
Description=Convert new releases to MLX
Wants=network-online.target
After=network-online.target

[Service]
Type=oneshot
ExecStart={words}
EnvironmentFile=-%h/.config/mlx-dayzero.env
SuccessExitStatus=143
KillMode=mixed
TimeoutStopSec={STOP_S}
Nice=10
"""
    timer = f"""[Unit]
Description=Convert new releases to MLX every night

[Timer]
OnCalendar=*-*-* {hour:02}:{minute:02}:00
Persistent=true
RandomizedDelaySec=5min

[Install]
WantedBy=timers.target
"""
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    units = folder / "systemd" / "user"
    files = {units / f"{NAME}.service": service, units / f"{NAME}.timer": timer}
    enable = f"systemctl --user daemon-reload && systemctl --user enable --now {NAME}.timer"
    return Schedule(files, f"{enable} (and `loginctl enable-linger` to run while logged out)")


def _systemd_word(word: str) -> str:
    """A word of ExecStart: specifiers, variables and quotes made literal."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"' if re.search(r"[\s'\";\\]", escaped) else escaped


def _launchd(command: list[str], hour: int, minute: int) -> Schedule:
    log = str(Path.home() / "Library" / "Logs" / f"{NAME}.log")
    data = {
        "Label": _LABEL,
        "ProgramArguments": command,
        "StartCalendarInterval": {"Hour": hour, "Minute": minute},
        "StandardErrorPath": log,
        "StandardOutPath": log,
        "ExitTimeOut": STOP_S,
        "ProcessType": "Background",
    }
    path = Path.home() / "Library" / "LaunchAgents" / f"{_LABEL}.plist"
    return Schedule({path: plistlib.dumps(data).decode()}, f"launchctl load -w {path}")


def _cron(command: list[str], hour: int, minute: int) -> Schedule:
    line = shlex.join(command).replace("%", "\\%")  # cron takes a bare % for a line break
    return Schedule({Path("crontab"): f"{minute} {hour} * * * {line}\n"}, "crontab -e")
