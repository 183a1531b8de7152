"""Fixtures that several files share; whatever needs torch is made once, and only when asked for."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINYLM = Path(__file__).parent / "fixtures" / "tinylm"


@pytest.fixture(scope="session")
def tinylm() -> Path:
    return TINYLM


@pytest.fixture(scope="session")
def tinylm_output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tinylm converted, which both stock runtimes load; tests only read it."""
    from converter.pipeline import Request, convert
    from converter.ui import Console

    out = tmp_path_factory.mktemp("tinylm") / "out"
    convert(Request(hf_path=str(TINYLM), mlx_path=out), Console(quiet=True))
    return out


@pytest.fixture(scope="session")
def twin_of(tmp_path_factory: pytest.TempPathFactory):
    """The folder of a type's float32 twin, made on its first use; tests only read it."""
    from validate.twin import load_example, make_twin

    root = tmp_path_factory.mktemp("session-twins")

    def get(model_type: str, dtype: str = "float32") -> Path:
        folder = root / f"{model_type}-{dtype}"
        if not folder.exists():
            make_twin(load_example(model_type), folder, dtype=dtype)
        return folder

    return get


@pytest.fixture(scope="session")
def twin_folders(twin_of) -> dict[str, Path]:
    """The folders of the float32 twins of all types that have an example config."""
    from validate.twin import list_examples

    return {name: twin_of(name) for name in list_examples()}


@pytest.fixture(scope="session")
def runtimes() -> None:
    """The stock MLX runtimes, importable and fast."""
    from validate.runtime import prepare_mlx

    prepare_mlx()


@pytest.fixture(scope="session")
def program() -> list[str]:
    """The command line of this checkout, whether it is installed or not."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from converter.cli import main; main()"
    return [sys.executable, "-c", code]


@pytest.fixture(scope="session")
def postgres():
    """A PostgreSQL server of one's own."""
    from benchmarks.postgres import running_postgres

    with running_postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger_url(request, tmp_path):
    """The address of an empty ledger, on both databases."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'ledger.db'}"
    return request.getfixturevalue("postgres").database().replace(":", "+psycopg:", 1)


@pytest.fixture
def closed_ledgers():
    """Closes what ``batch_helpers.ledger`` opened."""
    from batch_helpers import close_ledgers

    yield
    close_ledgers()


@pytest.fixture
def catalogue(tmp_path, closed_ledgers):
    """The catalogue of a new SQLite ledger in a state folder."""
    from batch_helpers import ledger

    from converter.batch.catalogue import Catalogue

    return Catalogue(ledger(f"sqlite:///{tmp_path / 'state' / 'ledger.db'}"))


@pytest.fixture
def mine(catalogue):
    """The ledger of that catalogue, as a worker has it."""
    return catalogue.ledger


@pytest.fixture
def faults():
    """What strikes requests of the staging hub."""
    from converter.staging import Faults

    return Faults()


@pytest.fixture
def api(tmp_path, faults, monkeypatch):
    """The client of a staging hub, which everything in this process then takes for the hub."""
    from huggingface_hub import HfApi

    from converter.hub import api as hub_api
    from converter.staging import StagingOptions, running_hub

    token = "hf_sentinelsentinelsentinel"
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub_api, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(hub_api, "LONGEST_WAIT_S", 0.01)
    options = StagingOptions(page_size=2)
    with running_hub(tmp_path / "hub", options=options, faults=faults) as endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        place = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", place)
        yield HfApi(endpoint=endpoint, token=token)


@pytest.fixture
def impatient(monkeypatch):
    """A token, and little waiting between two tries of a request."""
    from hub_helpers import TOKEN

    from converter.hub import api as hub_api

    monkeypatch.setattr(hub_api, "FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def endpoint(tmp_path, faults):
    """The address of a staging hub, for calls that are told it."""
    from converter.staging import running_hub

    with running_hub(tmp_path / "hub", faults=faults) as url:
        yield url


@pytest.fixture
def folder(tmp_path):
    """A small model to publish."""
    from hub_helpers import CARD, WEIGHTS

    root = tmp_path / "model"
    (root / "sub").mkdir(parents=True)
    (root / "README.md").write_text(CARD)
    (root / "config.json").write_text("{}")
    (root / "model.safetensors").write_bytes(WEIGHTS)
    (root / "sub" / "note.txt").write_text("note")
    (root / ".journal").write_text("not to be published")
    return root


@pytest.fixture
def published(endpoint, folder):
    """The address of a staging hub that has that model."""
    from hub_helpers import REPO

    from converter import hub

    hub.upload(folder, REPO, commit_message="first", endpoint=endpoint)
    return endpoint


@pytest.fixture(scope="session")
def forkserver():
    """The server that the stages of pretending engines are forked from."""
    from batch_helpers import start_forkserver

    start_forkserver()


@pytest.fixture
def place(tmp_path, forkserver, closed_ledgers):
    """A ledger's address, and the folder of the work."""
    work = tmp_path / "work"
    work.mkdir()
    return f"sqlite:///{tmp_path / 'ledger.db'}", work


@pytest.fixture
def small_windows(monkeypatch):
    """Streams in windows, and conversions in units, that a small release has many of."""
    from stream_helpers import WINDOW

    from converter.execute import units
    from converter.hub import stream

    monkeypatch.setattr(stream, "WINDOW", WINDOW)
    monkeypatch.setattr(units, "UNIT_BYTES", WINDOW)
