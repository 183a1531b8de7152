"""The watch list: which releases are converted into what, and what they may cost.

TOML or YAML, read into frozen models that forbid unknown keys; every problem is reported at once
with the file and the key.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from converter.batch.mistakes import near, told
from converter.batch.quantities import expanded, parse_duration, parse_rate, parse_size, whole_path
from converter.errors import ConvertError, UsageError
from converter.naming import published_as
from converter.variants import named_variant
from quant.recipe import CALIBRATED, Method, Mode, QuantSpec

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?:@[\w./-]+)?")
_ACCOUNT = re.compile(r"[A-Za-z0-9][\w.-]*")
TAG = re.compile(r"[a-z0-9][a-z0-9.-]{0,39}")
"""What a worker may be tagged with."""
_ELSEWHERE: Final = "elsewhere"
"""Validation context of a list whose texts and adapters may lie on other machines alone."""


def _matching(pattern: re.Pattern[str], what: str) -> AfterValidator:
    def check(value: str) -> str:
        if not pattern.fullmatch(value):
            raise ValueError(f"{value!r} is not {what}")
        return value

    return AfterValidator(check)


def _template(names: str) -> str:
    # Nothing but whole names: a format, index or attribute of one would be Python's business.
    made = re.sub(r"\{(organisation|model|variant)\}", "x", names)
    if not _ACCOUNT.fullmatch(made) or "{model}" not in names:
        raise ValueError(
            f"{names!r} is not made of {{organisation}}, {{model}}, {{variant}}, letters, digits, "
            "-, _ and .; {model} must be among them"
        )
    return names


def _variant(name: str) -> str:
    named_variant(name)
    return name


def _adapter(path: Path, info: ValidationInfo) -> Path:
    from converter.adapter import read_adapter

    path = whole_path(path)
    if info.context == _ELSEWHERE:
        return path
    try:
        read_adapter(path)
    except ConvertError as error:
        raise ValueError(str(error).removeprefix("--adapter-path ")) from error
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    return path


def _text(path: Path, info: ValidationInfo) -> Path:
    from quant.calibrate.text import CalibrationError, read_text

    path = whole_path(path)
    if info.context == _ELSEWHERE:
        return path
    try:
        read_text(path)
    except CalibrationError as error:
        raise ValueError(str(error).removeprefix("--calibration-data ")) from error
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    return path


Size = Annotated[int, BeforeValidator(parse_size), Field(gt=0, le=10**18)]
Rate = Annotated[float, BeforeValidator(parse_rate), Field(gt=0)]
Duration = Annotated[float, BeforeValidator(parse_duration), Field(gt=0)]
Folder = Annotated[Path, AfterValidator(whole_path)]
Account = Annotated[str, _matching(_ACCOUNT, "the name of an account")]
Repo = Annotated[str, _matching(_REPO, "a repo such as Qwen/Qwen3-0.6B, or REPO@REVISION")]
Secret = Annotated[str, AfterValidator(expanded)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Filters(_Strict):
    """Which of an organisation's releases are wanted; what is not given lets everything pass."""

    include: tuple[str, ...] = Field(default=("*",), strict=False)
    """Names to take, as shell patterns without the organisation."""
    exclude: tuple[str, ...] = Field(default=(), strict=False)
    pipeline_tags: tuple[str, ...] | None = Field(default=None, strict=False)
    licences: tuple[str, ...] | None = Field(default=None, strict=False)
    """Licence identifiers of the hub; a release that states none passes only without this."""
    min_size: Size | None = None
    max_size: Size | None = None
    """Bytes of the weight files."""
    max_age: Duration | None = None
    """Since the repo was created."""
    min_downloads: int = Field(default=0, ge=0)
    """In the last 30 days, as the hub counts them."""


class Gates(_Strict):
    """What must hold before anything is published."""

    kl_threshold: float | None = Field(default=None, gt=0)
    """Most nats of mean KL divergence that quantizing may cost."""
    allow_unproven: bool = False
    allow_gated: bool = False
    twin: bool = True
    """Whether a twin is converted and compared before any weight is fetched."""
    accept: Annotated[str, _matching(TAG, "a tag such as metal, darwin or linux")] | None = None
    """Tag of the workers that drive outputs through the stock runtimes before publishing."""


class Recipe(_Strict):
    """A variant of one's own; names follow the command line."""

    dtype: Literal["float16", "bfloat16", "float32"] | None = None
    q_mode: Mode | None = None
    q_bits: int | None = None
    q_group_size: int | None = None
    q_method: Method = "rtn"
    tuning_iterations: int | None = Field(default=None, ge=1)
    calibration_sequences: int | None = Field(default=None, ge=1)
    calibration_length: int | None = Field(default=None, ge=8)
    quant_predicate: str | None = None
    q_target_bpw: float | None = Field(default=None, ge=1, le=32)
    q_target_size: Size | None = None
    """Bytes of the weight files."""
    adapter_path: Annotated[Path, AfterValidator(_adapter)] | None = Field(
        default=None, strict=False
    )
    """Folder of a LoRA or DoRA that is fused into every release made with this recipe."""
    kv_rotate_values: bool = False
    dequantize: bool = False
    mtp: bool = False
    """Whether a drafter is made beside each output, and published beside it."""

    @property
    def targeted(self) -> bool:
        """Whether formats are chosen for a size."""
        return self.q_target_bpw is not None or self.q_target_size is not None

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        own = [key for key in ("q_bits", "q_mode", "quant_predicate") if getattr(self, key)]
        if self.targeted and own:
            raise ValueError(f"{own[0]}: q_target_bpw and q_target_size choose it themselves")
        if self.q_target_bpw is not None and self.q_target_size is not None:
            raise ValueError("q_target_bpw and q_target_size are two targets; give one")
        quant = self.quant()
        if quant is not None and self.dequantize:
            raise ValueError("dequantize gives plain weights, and other keys quantize them")
        method = "rtn" if quant is None else quant.method
        if self.tuning_iterations is not None and method != "autoround":
            raise ValueError(f"tuning_iterations has no effect with q_method {method}")
        texts = [k for k in ("calibration_sequences", "calibration_length") if getattr(self, k)]
        if texts and method not in CALIBRATED and not self.targeted:
            raise ValueError(f"{texts[0]} has no effect with q_method {method}")
        if self.quant_predicate is not None:
            from quant.mixed import MIXED_RECIPES

            if self.quant_predicate not in MIXED_RECIPES:
                known = ", ".join(MIXED_RECIPES)
                raise ValueError(f"quant_predicate {self.quant_predicate!r} is not one of {known}")
        return self

    def quant(self) -> QuantSpec | None:
        """The quantization, None for plain weights; ValueError where no runtime reads it."""
        plain = (self.q_mode, self.q_bits, self.quant_predicate) == (None, None, None)
        if plain and not self.targeted:
            if self.q_group_size is not None or self.q_method != "rtn":
                raise ValueError(
                    "q_group_size and q_method have no effect without q_bits, q_mode or a target"
                )
            return None
        return QuantSpec.make(
            self.q_mode or "affine", self.q_bits, self.q_group_size, self.q_method
        )


class Watch(_Strict):
    """Some organisations and models, and what is made of their releases."""

    organisations: tuple[Account, ...] = Field(default=(), strict=False)
    models: tuple[Repo, ...] = Field(default=(), strict=False)
    """Single repos, followed whatever the filters say; ``REPO@REVISION`` follows that branch."""
    variants: tuple[Annotated[str, AfterValidator(_variant)], ...] = Field(default=(), strict=False)
    recipes: tuple[str, ...] = Field(default=(), strict=False)
    """Names of entries of the top-level ``recipes``."""
    calibration_data: Annotated[Path, AfterValidator(_text)] | None = Field(
        default=None, strict=False
    )
    filters: Filters = Filters()
    gates: Gates = Gates()

    @model_validator(mode="after")
    def _asks_for_something(self) -> Watch:
        if not (self.organisations or self.models):
            raise ValueError("names neither organisations nor models")
        if not (self.variants or self.recipes):
            raise ValueError("names neither variants nor recipes")
        return self

    def follows_what(self, other: Watch) -> bool:
        """Whether some release is surely followed by both: a model, or what one filter lets pass.

        Entries with different filters may split an organisation's releases between them.
        """
        models = {model.partition("@")[0] for model in self.models}
        if models & {model.partition("@")[0] for model in other.models}:
            return True
        return self.filters == other.filters and bool(
            {*self.organisations} & {*other.organisations}
        )


class Budgets(_Strict):
    """What a run may use of its machine."""

    disk: Size | None = None
    """Bytes of sources, outputs and work; None for what is free."""
    memory: Size | None = None
    """Bytes of all conversions and proofs at once; None for four fifths of the machine's."""
    bandwidth: Rate | None = None
    """Bytes per second of all downloads together."""
    jobs: int = Field(default=1, ge=1, le=64)
    """Conversions and proofs at once."""
    downloads: int = Field(default=1, ge=1, le=16)
    uploads: int = Field(default=1, ge=1, le=16)


class Retries(_Strict):
    """How failures that may pass are tried again."""

    attempts: int = Field(default=5, ge=1, le=20)
    """Of one stage of one job, before it is parked."""
    first_wait: Duration = 60.0
    """Doubled after each failure."""
    longest_wait: Duration = 3600.0
    patience: Duration = 1800.0
    """How long a run waits for the next retry that is due; later ones are the next run's."""
    gated_wait: Duration = 86400.0
    lease: Duration = 600.0
    """After this long without a heartbeat another machine may take over."""


class Fleet(_Strict):
    """Several workers on one night."""

    shared: Folder | None = Field(default=None, strict=False)
    """Folder that every worker sees under this path; releases are worked on there."""
    split: Size | None = None
    """Releases of at least so many bytes are converted by several workers, by output shard."""

    @model_validator(mode="after")
    def _consistent(self) -> Fleet:
        if self.split is not None and self.shared is None:
            raise ValueError("split needs a shared folder, in which the workers meet")
        return self


class Mail(_Strict):
    """The digest by SMTP."""

    host: str
    port: int = Field(default=587, ge=1, le=65535)
    starttls: bool = True
    sender: str
    to: tuple[str, ...] = Field(min_length=1, strict=False)
    user: str | None = None
    password: Secret | None = None


class Digest(_Strict):
    """Who is told about a run; off unless given."""

    webhook: Secret | None = None
    mail: Mail | None = None
    always: bool = False
    """Also after a run in which nothing happened."""


class WatchList(_Strict):
    """The whole file."""

    namespace: Account
    """Account that publishes."""
    names: Annotated[str, AfterValidator(_template)] = "{model}-{variant}"
    """Name of a published repo, from {organisation}, {model} and {variant}."""
    private: bool = False
    state: Folder | None = Field(default=None, strict=False)
    ledger: Secret | None = None
    """SQLAlchemy URL; None for SQLite in the state folder."""
    watch: tuple[Watch, ...] = Field(min_length=1, strict=False)
    recipes: dict[str, Recipe] = {}
    budgets: Budgets = Budgets()
    retries: Retries = Retries()
    digest: Digest = Digest()
    fleet: Fleet = Fleet()

    @model_validator(mode="after")
    def _names_resolve(self) -> WatchList:
        problems = []
        for number, entry in enumerate(self.watch):
            for name in entry.recipes:
                if name not in self.recipes:
                    hint = near(name, self.recipes)
                    problems.append(f"watch[{number}].recipes: there is no recipe {name!r}{hint}")
            twice = {n for n in entry.variants if n in entry.recipes}
            problems += [
                f"watch[{number}]: {n!r} is both a variant and a recipe" for n in sorted(twice)
            ]
            problems += [] if twice else self._shared_repos(f"watch[{number}]", entry)
        for (first, one), (second, other) in combinations(enumerate(self.watch), 2):
            if one.follows_what(other):
                where = f"watch[{first}] and watch[{second}]"
                problems += self._shared_repos(where, one, other)
        for name in self.recipes:
            if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
                problems.append(f"recipes.{name}: not a name that a repo may end in")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _shared_repos(self, where: str, *entries: Watch) -> Iterator[str]:
        """What is wrong where two outputs of one release would be published in one repo.

        Of several entries: what none of them has wrong by itself.
        """
        asked = [(*entry.variants, *entry.recipes) for entry in entries]
        makers: dict[str, list[str]] = {}
        for name in dict.fromkeys(name for names in asked for name in names):
            drafted = name in self.recipes and self.recipes[name].mtp
            for repo in published_as(self.target("organisation/model", name), mtp=drafted):
                makers.setdefault(repo, []).append(name)
        for repo, names in makers.items():
            alone = len(asked) > 1 and any(set(names) <= set(one) for one in asked)
            if len(names) > 1 and not alone:
                yield (
                    f"{where}: {' and '.join(names)} would both be published as {repo}; "
                    "rename one, or give names with {variant}"
                )

    def target(self, repo: str, variant: str) -> str:
        """The repo in which a variant of a release is published."""
        organisation, _, model = repo.partition("/")
        name = self.names.format(organisation=organisation, model=model, variant=variant)
        return f"{self.namespace}/{name}"


_TABLES: Final[dict[str, type[BaseModel]]] = {
    "watch": Watch,
    "filters": Filters,
    "gates": Gates,
    "recipes": Recipe,
    "budgets": Budgets,
    "retries": Retries,
    "fleet": Fleet,
    "digest": Digest,
    "mail": Mail,
}


def read_watchlist(path: Path, *, inputs: bool = True) -> WatchList:
    """The watch list in a .toml, .yaml or .yml file; UsageError with every problem.

    ``inputs``: whether the calibration texts and adapters that it names must lie here, as for who
    makes jobs of them; a worker needs those of its own jobs alone, and each job looks for its own.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise UsageError(f"{path}: cannot be read: {why}") from error
    return parse_watchlist(path, text, inputs=inputs)


def parse_watchlist(path: Path, text: str, *, inputs: bool = True) -> WatchList:
    """The watch list that ``path`` says in ``text``; UsageError with every problem."""
    context = None if inputs else _ELSEWHERE
    try:
        return WatchList.model_validate(_parsed(path, text), context=context)
    except ValidationError as error:
        lines = told(path, error.errors(), top=WatchList, tables=_TABLES)
        raise UsageError("\n".join(lines)) from None


def _parsed(path: Path, text: str) -> Any:
    if path.suffix == ".toml":
        try:
            return tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}: is not TOML: {_brief(error)}") from error
    if path.suffix in (".yaml", ".yml"):
        import yaml

        from converter.batch.strict_yaml import load

        try:
            return load(text)
        except (yaml.YAMLError, ValueError, AttributeError, RecursionError) as error:
            # Beside its own errors it lets those of a date or number that is none pass.
            raise UsageError(f"{path}: is not YAML: {_brief(error)}") from error
    raise UsageError(f"{path}: a watch list ends in .toml, .yaml or .yml")


def _brief(error: Exception) -> str:
    deep = isinstance(error, RecursionError)
    return "nested too deeply" if deep else str(error)[:500]
