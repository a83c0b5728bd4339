"""Records: what was measured of each variant, on disk as soon as it is measured, and as a table.

One lesson writes one file, `<base>/<machine>/<model>/<lesson>.json`. Beside the models' folders
lies `machine.json`, what the hardware can do (`keep_limits`).
"""

import contextlib
import datetime
import fcntl
import itertools
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from helpers import machine, memory, models, quality, timing

ROOT = Path(__file__).resolve().parent.parent
SCHEMA: Literal[2] = 2
GB = 1e9
STABLE = 0.05  # two readings of bandwidth so close together make one that counts

SPEED = ("tokens_per_s", "decode_tokens_per_s", "prefill_tokens_per_s", "moved_bytes_per_s")
PAIRED = ("speedup", "speedup_ci95")
MEMORY = (
    "weight_bytes",
    "kv_cache_bytes",
    "resident_before_bytes",
    "peak_bytes",
    "load_peak_bytes",
    "peak_kind",
)
QUALITY = ("perplexity", "eval_text", "eval_tokens", "eval_seq_len", "scored_with")
COMPARED = ("nll_delta", "nll_delta_ci95", "agreement", "kl_divergence")
NULLABLE = SPEED + PAIRED + MEMORY + QUALITY + COMPARED

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Bytes = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(ge=1, lt=2**63)]
# what stands in tables and charts begins with a letter or digit and holds no markup: nothing that a
# spreadsheet, a browser or LaTeX would obey
Name = Annotated[str, Field(pattern=r"^[^\W_][^<>|`\\\r\n\t]*$")]
PLAIN = str.maketrans("|<>`\\\n", "¦‹›'/ ")  # for sentences that hold others' words
Scalar = bool | int | Number | str | None
Fields = dict[str, Any]  # of a record, by name, before it is checked


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Pair(Strict):
    """Run i of a variant beside run i of its baseline, whole latencies."""

    baseline: str
    baseline_s: Seconds
    variant_s: Seconds


class Record(Strict):
    """One variant, measured. SI units in names; a null measured value is explained in `reasons`.

    step_bytes : what a decode step must read. moved_bytes_per_s : that over the time of a step.
    launches : kernels that a decode step starts, on a GPU (`limits.launches`).
    scored_with : the arithmetic in which quality was scored. details : what only this technique
    has, flat, units in names; `helpers/data/details.csv` says what each means.
    """

    technique: Name
    id: Name
    variant: Name
    baseline: Name | None = None
    sweep: Name | None = None
    status: Literal["ok", "oom", "unsupported", "failed"] = "ok"
    reason: str | None = None
    engine: Name = "transformers"
    engine_version: Name | None = None
    threads: int
    affinity: list[int]
    world_size: Count = 1
    model: Name
    model_revision: Name | None = None
    dtype: Name | None = None
    device: Name
    batch_size: Count = 1
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    seed: int | None = None
    warmup_s: list[Seconds] = []
    latency_s: list[Seconds] = []
    ttft_s: list[Seconds] = []
    inter_token_s: list[Seconds] = []
    busy_share: list[Share] = []
    pairs: list[Pair] = []
    tokens_per_s: Positive | None = None
    decode_tokens_per_s: Positive | None = None
    prefill_tokens_per_s: Positive | None = None
    speedup: Positive | None = None
    speedup_ci95: tuple[Positive, Positive] | None = None
    weight_bytes: Bytes | None = None
    kv_cache_bytes: Bytes | None = None
    step_bytes: Bytes | None = None
    launches: int | None = None
    moved_bytes_per_s: Positive | None = None
    resident_before_bytes: Bytes | None = None
    peak_bytes: Bytes | None = None
    load_peak_bytes: Bytes | None = None
    peak_kind: str | None = None
    perplexity: Positive | None = None
    nll_delta: Number | None = None
    nll_delta_ci95: tuple[Number, Number] | None = None
    agreement: Share | None = None
    kl_divergence: Number | None = None
    eval_text: str | None = None
    eval_tokens: int | None = None
    eval_seq_len: int | None = None
    scored_with: str | None = None
    warnings: list[str] = []
    reasons: dict[str, str] = {}
    details: dict[str, Scalar | list[Scalar]] = {}

    @model_validator(mode="after")
    def _nulls_are_explained(self) -> Self:
        if self.status != "ok" and not self.reason:
            raise ValueError(f"{self.id}: status {self.status} without a reason")
        if self.status == "ok":
            bare = [f for f in NULLABLE if getattr(self, f) is None and f not in self.reasons]
            if bare:
                raise ValueError(f"{self.id}: null without a reason: {', '.join(bare)}")
        return self


class Run(Strict):
    """When and how the records were made. finished : the lesson ran to its end."""

    date: str
    profile: str
    commit: str | None
    finished: bool = True
    parameters: dict[str, Scalar | list[Scalar]]


class Gpu(Strict):
    name: Name
    memory_bytes: Bytes
    compute_capability: str


class Machine(Strict):
    """The machine as `helpers.machine.describe` tells it."""

    slug: Name
    architecture: Name
    cpu: Name
    cores: int
    instruction_sets: list[str]
    memory_bytes: Bytes
    gpus: list[Gpu]
    os: str
    versions: dict[Name, Name]
    cuda: str | None = None
    driver: str | None = None
    power_limit_w: list[float | None] = []


class Results(Strict):
    """One file: the records of one lesson, of one model, on one machine."""

    schema_: Literal[2] = Field(default=SCHEMA, alias="schema")
    machine: Machine
    run: Run
    records: Annotated[list[Record], Field(min_length=1)]

    @model_validator(mode="after")
    def _ids_fit(self) -> Self:
        ids = [record.id for record in self.records]
        if len(ids) != len(set(ids)):
            raise ValueError("record ids are not unique")
        named = {record.baseline for record in self.records}
        for record in self.records:
            named.update(pair.baseline for pair in record.pairs)
        missing = {name for name in named if name is not None} - set(ids)
        if missing:
            raise ValueError(f"baselines that are no record here: {', '.join(sorted(missing))}")
        return self


class Ceilings(Strict):
    """What one device can do. bandwidth_spread : of its readings, interquartile range ÷ median."""

    bandwidth_bytes_per_s: Positive
    bandwidth_spread: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    bandwidth_readings: int
    flops_per_s: dict[str, Positive] = {}
    launch_s: Positive | None = None


class MachineLimits(Strict):
    """`machine.json`: begun anew when the hardware or torch changes."""

    schema_: Literal[2] = Field(default=SCHEMA, alias="schema")
    hardware: str
    torch: str
    devices: dict[str, Ceilings] = {}


def json_schema() -> str:
    """The schema of a results file, as `helpers/data/results.schema.json` holds it."""
    return json.dumps(Results.model_json_schema(by_alias=True), indent=1) + "\n"


# ---- where things lie


def is_reference() -> bool:
    """Is this a reference run (`make reference`), which writes into the tracked folders?"""
    return os.environ.get("SEVEN_PROFILE") == "reference"


def profile() -> str:
    """ "full", or "smoke" in a quick run with small numbers (`helpers.series.run` says so)."""
    return "smoke" if os.environ.get("SEVEN_PROFILE") == "smoke" else "full"


def in_checkout() -> bool:
    """Does the working folder lie inside this project's checkout?"""
    return (ROOT / "notebooks").is_dir() and Path.cwd().resolve().is_relative_to(ROOT)


def base_folder(results_dir: str = "") -> Path:
    """`results_dir`, relative to the working folder, or by default `runs` (not tracked by git): the
    checkout's own, or the working folder's outside of one. A reference run: `notebooks/results`.
    """
    if results_dir:
        return Path(results_dir).expanduser().resolve()
    if is_reference():
        return ROOT / "notebooks" / "results"
    return (ROOT if in_checkout() else Path.cwd()) / "runs"


def profile_folder(folder: Path) -> Path:
    """A model's folder, or `smoke` below it in a quick run: the two never mix."""
    return folder / "smoke" if profile() == "smoke" else folder


def model_folder(model: str, device: str | None = None, results_dir: str = "") -> Path:
    """`<base>/<machine>/<model>`, and `smoke` below it for a quick run.

    device : that of the run; a run on the CPU of a GPU machine has a folder of its own.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", models.identity(model)[0]).strip("-")
    return profile_folder(base_folder(results_dir) / machine.slug(device) / name)


def write_atomically(path: Path, content: str) -> None:
    """Write a whole file or none: into a temporary file beside it, then renamed over it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=".", suffix=".part", delete=False, encoding="utf-8"
    ) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def check(results_dir: str = "", **positive: int) -> None:
    """Refuse bad parameters before anything long starts.

    positive : parameters that must be at least 1, by name.

    Raises ValueError in one sentence that names the first, or the folder that cannot be written.
    """
    for name, value in positive.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")
    folder = base_folder(results_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"RESULTS_DIR={results_dir!r} cannot be written to: {error.strerror}."
        ) from error


# ---- a lesson's records while it runs


def null(reason: str, *fields: str) -> dict[str, str]:
    """Reasons for fields that are null: `null("not applicable", *results.QUALITY)`."""
    return dict.fromkeys(fields, reason)


class Lesson:
    """The records of a lesson that runs: each is on disk when the call that adds to it returns.

    Until `finish()` they stand in `<lesson>.partial.json`, so that an earlier whole run is not lost
    to one that breaks off. Made by `results.open`.

    unread_bytes : weights that a decode step does not read (`limits.decode_bytes`), of all rows
        that do not name their own.
    """

    def __init__(
        self,
        name: str,
        technique: str,
        model: str,
        parameters: Fields,
        common: Fields,
        folder: Path,
    ):
        self.name = name
        self.technique = technique
        self.folder = folder
        self.parameters = parameters
        self.common = common
        name, self.revision = models.identity(model)
        self.model = name.translate(PLAIN).lstrip(" _.=+-@'/")  # of a folder of any name
        self.machine = machine.describe(common["device"])
        self.commit = machine.commit()
        self.unread_bytes = 0
        self.rows: dict[str, Fields] = {}

    @property
    def machine_folder(self) -> Path:
        return self.folder.parent.parent if self.folder.name == "smoke" else self.folder.parent

    @property
    def partial(self) -> Path:
        return self.folder / f"{self.name}.partial.json"

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.json"

    def __call__(self, measured: dict[str, timing.Series], **fields: Any) -> None:
        """Keep what `timing.measure` has measured so far: pass the lesson as its `keep`.

        fields : of all these rows (`functools.partial(lesson, sweep="prompt_tokens")`).
        """
        for name, series in measured.items():
            self._merge(name, fields)
            baseline = measured.get(series.baseline) if series.baseline else None
            self._merge(name, _timed(series, baseline))
        self._write()

    def add(
        self,
        name: str,
        *,
        series: timing.Series | None = None,
        baseline_series: timing.Series | None = None,
        peak: memory.Peak | None = None,
        quality: quality.Quality | None = None,
        text: models.Text | None = None,
        **fields: Any,
    ) -> None:
        """Add to the row `name`, or begin it.

        Parameters
        ----------
        series, baseline_series : runs that `timing.measure` did not keep.
        peak, quality, text : its memory; its scores, and the text that they are on.
        fields : any other field of `Record`; `details` and `reasons` are added to.

        Raises ValueError for a field or a value that no record has.
        """
        if series is not None:
            self._merge(name, _timed(series, baseline_series))
        if peak is not None:
            self._merge(name, _memory(peak))
        if quality is not None:
            self._merge(name, _scores(quality, text))
        self._merge(name, fields)
        self._write()

    def add_peak(
        self,
        name: str,
        variant: timing.Variant,
        release: Callable[[], object] = lambda: None,
        warm: bool = False,
    ) -> bool:
        """Measure a variant's peak memory into its row, or write there why it cannot run here.

        release, warm : as `memory.peak_of` takes them.

        Returns whether it ran.
        """
        try:
            peak = memory.peak_of(variant, self.common["device"], release, warm)
        except Exception as error:
            status, reason = timing.failure(error)
            self.add(name, status=status, reason=reason)
            print(f"{name}: {reason}")
            return False
        self.add(name, peak=peak)
        return True

    def _merge(self, name: str, fields: Fields) -> None:
        row = self.rows.setdefault(name, {"id": name, "variant": name})
        for field, value in fields.items():
            if field in ("details", "reasons"):
                row[field] = row.get(field, {}) | value
            else:
                row[field] = value

    def record(self, name: str) -> Record:
        """One row as it stands, whole: what was not measured is null, with the reason."""
        row = self.rows[name]
        defaults: Fields = {
            "technique": self.technique,
            "model": self.model,
            "model_revision": self.revision,
            "threads": torch.get_num_threads(),
            "affinity": sorted(os.sched_getaffinity(0)),
        }
        values = defaults | self.common | row
        if "engine_version" not in values:
            engine = values.get("engine", "transformers")
            values["engine_version"] = self.machine["versions"].get(engine)
        _add_traffic(values, values.pop("unread_bytes", self.unread_bytes))
        if self.model.startswith("random:"):
            values |= dict.fromkeys(QUALITY + COMPARED)
            values["reasons"] = values.get("reasons", {}) | null(
                "random weights", *QUALITY, *COMPARED
            )
        values["reasons"] = _reasons(values)
        return Record(**values)

    @property
    def records(self) -> list[Record]:
        """All rows in the order in which they were begun."""
        return [self.record(name) for name in self.rows]

    def headline(self) -> list[Record]:
        """The rows that are not of a sweep."""
        return [record for record in self.records if record.sweep is None]

    def frame(self) -> pd.DataFrame:
        """See `results.frame`."""
        return frame(self.records, read_limits(self.machine_folder))

    def table(self, records: list[Record] | None = None) -> pd.DataFrame:
        """See `results.table`; all rows by default."""
        return table(self.records if records is None else records, read_limits(self.machine_folder))

    def keep_limits(self, **measured: Any) -> None:
        """See `results.keep_limits`: what this run saw the device do."""
        keep_limits(measured, self.common["device"], self.machine_folder)

    def bandwidth(self) -> float:
        """The highest stable bandwidth of this device in bytes/s; NaN as long as there is none."""
        limits = read_limits(self.machine_folder)
        kind = torch.device(self.common["device"]).type
        if limits is None or kind not in limits.devices:
            return math.nan
        return limits.devices[kind].bandwidth_bytes_per_s

    def _file(self, finished: bool) -> Results:
        now = datetime.datetime.now(datetime.UTC)
        run = Run(
            date=now.strftime("%Y-%m-%dT%H:%M:%SZ"),
            profile=profile(),
            commit=self.commit,
            finished=finished,
            parameters=self.parameters,
        )
        content = {"machine": self.machine, "run": run, "records": self.records}
        return Results.model_validate(content)

    def _write(self) -> None:
        try:
            content = self._file(finished=False).model_dump_json(by_alias=True, indent=1)
        except ValidationError as error:
            raise ValueError(first_fault(error)) from error
        write_atomically(self.partial, content + "\n")

    def finish(self) -> Path:
        """The lesson is done: its records replace those of an earlier run. Returns their path."""
        content = self._file(finished=True).model_dump_json(by_alias=True, indent=1)
        _keep_aside_if_refused(self.path)
        write_atomically(self.path, content + "\n")
        self.partial.unlink(missing_ok=True)
        return self.path


def _keep_aside_if_refused(path: Path) -> None:
    """A file that is there but does not read as results is renamed, not overwritten unseen."""
    if not path.exists():
        return
    try:
        read(path)
    except ValueError as error:
        for number in itertools.count(1):
            aside = path.with_name(f"{path.name}.refused-{number}")
            if not aside.exists():
                path.rename(aside)
                print(f"{error} It is kept as {aside.name}.")
                return


_locks: dict[Path, object] = {}  # held until this process ends


def open(
    name: str,
    model: str,
    parameters: Fields,
    *,
    device: str,
    seed: int,
    results_dir: str = "",
    technique: str = "",
) -> Lesson:
    """Begin the records of a lesson.

    Parameters
    ----------
    name : the notebook's name ("01_mixed_precision").
    model : the MODEL parameter.
    parameters : those that decide what is measured, for the file.
    technique : what follows the number in the name; a deeper notebook gives its lesson's.

    Raises ValueError in one sentence while another process writes the same records.
    """
    folder = model_folder(model, device, results_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lock_path = folder / f".{name}.lock"
    if lock_path not in _locks:
        lock = lock_path.open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise ValueError(
                f"Another run of {name} writes into this folder: wait for its end, or give this "
                "one another RESULTS_DIR."
            ) from None
        _locks[lock_path] = lock
    technique = technique or re.sub(r"^\d+_", "", name)
    return Lesson(name, technique, model, parameters, {"device": device, "seed": seed}, folder)


def _timed(series: timing.Series, baseline: timing.Series | None) -> Fields:
    """A record's fields that come from timed runs."""
    inter_token_s = itertools.chain.from_iterable(run.inter_token_s for run in series.runs)
    values: Fields = {
        "status": series.status,
        "reason": series.reason,
        "baseline": series.baseline,
        "warmup_s": [run.latency_s for run in series.warmup],
        "latency_s": series.latency_s,
        "ttft_s": [run.ttft_s for run in series.runs],
        "inter_token_s": list(inter_token_s),
        "busy_share": series.busy_share,
        "warnings": timing.instabilities(series, baseline),
    }
    if series.status != "ok" or not series.runs:
        return values
    first = series.runs[0]
    values |= {
        "tokens_per_s": series.median("tokens_per_s"),
        "decode_tokens_per_s": series.median("decode_tokens_per_s"),
        # zero prompt tokens: a workload of many prompts, which has no one prefill speed
        "prefill_tokens_per_s": series.median("prefill_tokens_per_s") or None,
        "prompt_tokens": first.prompt_tokens or None,
        "new_tokens": first.new_tokens,
        "batch_size": first.batch_size,
    }
    if series.baseline is not None and baseline is not None and baseline.runs:
        gain = timing.ratio(baseline.latency_s, series.latency_s)
        values["speedup"] = gain.value
        if gain.low is not None:
            values["speedup_ci95"] = (gain.low, gain.high)
        pairs = zip(baseline.latency_s, series.latency_s, strict=False)
        values["pairs"] = [
            Pair(baseline=series.baseline, baseline_s=theirs, variant_s=ours)
            for theirs, ours in pairs
        ]
    return values


def _memory(peak: memory.Peak) -> Fields:
    values: Fields = {
        "resident_before_bytes": peak.resident_before_bytes,
        "peak_bytes": peak.peak_bytes,
        "load_peak_bytes": peak.load_peak_bytes,
        "peak_kind": peak.kind,
        "details": peak.details,
    }
    allocator = memory.preloaded_allocator()
    if allocator is not None and peak.kind.startswith("process"):
        values["details"] = peak.details | {"allocator": allocator}
    return values


def _scores(scores: quality.Quality, text: models.Text | None) -> Fields:
    """A record's fields that come from scoring; what is not a number stays null, with a reason."""
    values: Fields = {
        "perplexity": scores.perplexity,
        "nll_delta": scores.nll_delta,
        "nll_delta_ci95": scores.nll_delta_ci95,
        "agreement": scores.agreement,
        "kl_divergence": scores.kl_divergence,
        "eval_tokens": scores.tokens,
        "eval_seq_len": scores.seq_len,
        "eval_text": text.label if text else None,
        "scored_with": scores.scored_with,
    }
    reasons = {}
    for field, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            values[field] = None
            reasons[field] = f"the model's scores are {value}: its numbers left the format's range"
    if "perplexity" in reasons:  # agreement with a model that says nothing is none
        for field in COMPARED:
            values[field] = None
            reasons[field] = reasons["perplexity"]
    return values | {"reasons": reasons}


def _add_traffic(values: Fields, unread_bytes: int) -> None:
    """step_bytes where it was not given, and moved_bytes_per_s: bytes of a step ÷ its time."""
    weights, cache = values.get("weight_bytes"), values.get("kv_cache_bytes")
    if values.get("step_bytes") is None and weights and cache is not None:
        values["step_bytes"] = max(0, round(weights - unread_bytes)) + cache
    steps_per_s = values.get("decode_tokens_per_s")
    if values.get("step_bytes") and steps_per_s:
        steps_per_s /= values.get("batch_size", 1)
        values["moved_bytes_per_s"] = values["step_bytes"] * steps_per_s


def _reasons(values: Fields) -> dict[str, str]:
    """Why each null value is null: as given, else by what the row is."""
    defaults = null("not measured", *NULLABLE)
    if values.get("baseline") is None:
        defaults |= null("this is the baseline", *PAIRED, *COMPARED)
    if values.get("new_tokens") == 1:
        defaults |= null(
            "one token has no step after it", "decode_tokens_per_s", "moved_bytes_per_s"
        )
    if values.get("speedup") is not None:
        defaults["speedup_ci95"] = "one pair gives no interval"
    if values.get("nll_delta") is not None:
        defaults["nll_delta_ci95"] = "one window gives no interval"
    reasons = defaults | values.get("reasons", {})
    return {field: why for field, why in reasons.items() if values.get(field) is None}


# ---- reading


def first_fault(error: ValidationError) -> str:
    """Where something that was read is not what it must be, and why, in one sentence."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or "the file"
    return " ".join(f"{where}: {first['msg']}.".split())


def read(path: Path) -> Results:
    """Read one results file.

    Raises ValueError in one sentence that names the file and what is wrong with it.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.get("schema") if isinstance(content, dict) else None
        if version == 1:
            raise ValueError("it is of the first edition (schema 1): run the lesson again.")
        return Results.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"{path.name} is refused as results: {first_fault(error)}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} cannot be read as results: {error}") from error


def machines_with_results(results_dir: str = "") -> dict[str, list[str]]:
    """The models that have results of this run's profile, by machine."""
    there: dict[str, list[str]] = {}
    for folder in sorted(base_folder(results_dir).glob("*/*/")):
        if any(profile_folder(folder).glob("[0-9][0-9]_*.json")):
            there.setdefault(folder.parent.name, []).append(folder.name)
    return there


def read_all(folder: Path) -> tuple[dict[str, Results], list[str]]:
    """All results in a model's folder, by lesson, and a sentence for each file that was refused.

    A deeper notebook's file stands after that of its lesson. Where a lesson has only an unfinished
    run, that is read, and a sentence says so.
    """
    lessons, problems = {}, []
    for path in sorted(Path(folder).glob("[0-9][0-9]_*.json")):
        name = path.name.removesuffix(".json").removesuffix(".partial")
        unfinished = path.name.endswith(".partial.json")
        if unfinished and path.with_name(f"{name}.json").exists():
            problems.append(f"{path.name}: an unfinished run lies beside the finished one.")
            continue
        try:
            lessons[name] = read(path)
        except ValueError as error:
            problems.append(str(error))
            continue
        if unfinished:
            count = len(lessons[name].records)
            problems.append(f"{name} broke off: {count} rows of an unfinished run are shown.")
    in_order = sorted(lessons, key=lambda name: _place(name, lessons[name]))
    return {name: lessons[name] for name in in_order}, problems


def _place(name: str, lesson: Results) -> tuple[str, bool, str]:
    """Where a file stands among others: by number, a lesson's own before its deeper notebooks'."""
    techniques = {record.technique for record in lesson.records}
    return name[:2], name[3:] not in techniques, name


# ---- what the machine can do


def read_limits(machine_folder: Path) -> MachineLimits | None:
    """What `machine.json` in this folder says; None where there is none that can be read."""
    path = Path(machine_folder) / "machine.json"
    with contextlib.suppress(OSError, ValueError):
        return MachineLimits.model_validate_json(path.read_text(encoding="utf-8"))
    return None


def stable_best(samples: list[float]) -> float | None:
    """The highest reading that another one confirms within 5 %; None where no two agree."""
    ordered = sorted(samples, reverse=True)
    for higher, lower in itertools.pairwise(ordered):
        if lower > (1 - STABLE) * higher:
            return higher
    return None


def keep_limits(measured: Fields, device: str, folder: Path | None = None) -> Ceilings | None:
    """Add readings to `machine.json`; the best stable ones are kept, so that ceilings only rise.

    Parameters
    ----------
    measured : any of bandwidth_samples (bytes/s), flops_per_s (by dtype), launch_s (seconds).
    folder : the machine's; by default that of the project's own results.

    Returns the device's ceilings; None as long as no bandwidth was stable.
    """
    folder = folder or base_folder() / machine.slug(device)
    this = machine.describe(device)
    hardware = ", ".join(gpu["name"] for gpu in this["gpus"])
    hardware = hardware or f"{this['cpu']}, {this['cores']} cores"
    limits = read_limits(folder)
    if limits is None or limits.hardware != hardware or limits.torch != torch.__version__:
        limits = MachineLimits(hardware=hardware, torch=torch.__version__)
    kind = torch.device(device).type
    ceilings = limits.devices.get(kind)
    samples = measured.get("bandwidth_samples", [])
    best = stable_best(samples)
    if best is not None and (ceilings is None or best > ceilings.bandwidth_bytes_per_s):
        before = ceilings
        ceilings = Ceilings(
            bandwidth_bytes_per_s=best,
            bandwidth_spread=timing.spread(samples),
            bandwidth_readings=len(samples),
        )
        if before is not None:
            ceilings.flops_per_s = before.flops_per_s
            ceilings.launch_s = before.launch_s
    if ceilings is None:
        return None
    for dtype, flops in measured.get("flops_per_s", {}).items():
        ceilings.flops_per_s[dtype] = max(flops, ceilings.flops_per_s.get(dtype, 0.0))
    launch_s = measured.get("launch_s")
    if launch_s is not None:
        ceilings.launch_s = min(launch_s, ceilings.launch_s or launch_s)
    limits.devices[kind] = ceilings
    write_atomically(
        folder / "machine.json", limits.model_dump_json(by_alias=True, indent=1) + "\n"
    )
    return ceilings


# ---- tables


def frame(records: list[Record], limits: MachineLimits | None = None) -> pd.DataFrame:
    """One row a record, in order, with derived columns.

    peak_above_bytes, load_above_bytes : peak while running and while loading, above the start.
    limit_tokens_per_s, limit_share : best possible decode speed, by bandwidth or by launches, and
    the share of it.
    same_engine : the baseline ran in the same engine, so that the ratio is the technique's.
    headline : no sweep, and no CPU processes standing in for GPUs.
    """
    rows = pd.DataFrame([record.model_dump() for record in records])
    number = rows[["peak_bytes", "load_peak_bytes", "resident_before_bytes"]].astype(float)
    rows["peak_above_bytes"] = number["peak_bytes"] - number["resident_before_bytes"]
    rows["load_above_bytes"] = number["load_peak_bytes"] - number["resident_before_bytes"]
    rows["limit_tokens_per_s"] = [decode_ceiling(record, limits) for record in records]
    rows["limit_share"] = rows["decode_tokens_per_s"].astype(float) / rows["limit_tokens_per_s"]
    engines = {(record.technique, record.id): record.engine for record in records}
    rows["same_engine"] = [
        record.baseline is None or engines.get((record.technique, record.baseline)) == record.engine
        for record in records
    ]
    rows["headline"] = [record.sweep is None and not shares_a_cpu(record) for record in records]
    return rows


def decode_ceiling(record: Record, limits: MachineLimits | None) -> float:
    """The lowest of a row's ceilings in tokens/s: bytes of a step by the bandwidth that the device
    reached at its best, launches of a step by what one takes; NaN where nothing is known.
    """
    kind = record.device.partition(":")[0]
    if limits is None or kind not in limits.devices or not record.step_bytes:
        return math.nan
    device = limits.devices[kind]
    step_s = record.step_bytes / device.bandwidth_bytes_per_s
    if record.launches and device.launch_s:
        step_s = max(step_s, record.launches * device.launch_s)
    return record.batch_size / step_s


def shares_a_cpu(record: Record) -> bool:
    """Are this row's ranks processes that share one CPU, in place of GPUs?"""
    return record.world_size > 1 and record.device.startswith("cpu")


def interval(
    value: float | None, ends: Sequence[float | None] | None, form: str = ".2f", unit: str = ""
) -> str:
    """A value with its interval, for reading; "–" where there is none."""
    if value is None or pd.isna(value):
        return "–"
    text = format(value, form) + unit
    if ends is None or ends[0] is None:
        return text
    return f"{text} [{ends[0]:{form}}, {ends[1]:{form}}]"


def _cell(value: float | None, form: str = ".2f") -> str:
    return "–" if value is None or pd.isna(value) else format(value, form)


def table(records: list[Record], limits: MachineLimits | None = None) -> pd.DataFrame:
    """One row a record, as text for reading: GB = 1e9 bytes, intervals at 95 %, memory above what
    was taken before, failures and warnings in words.
    """
    rows = []
    named = {(record.technique, record.baseline) for record in records}
    for record, derived in zip(records, frame(records, limits).itertuples(), strict=True):
        speedup = interval(record.speedup, record.speedup_ci95, unit="×")
        if record.baseline is None and (record.technique, record.id) in named:
            speedup = "baseline"
        notes = list(record.warnings)
        if record.status != "ok":
            notes.insert(0, f"{record.status}: {record.reason}")
        rows.append(
            {
                "variant": record.variant,
                "device": record.device,
                "tokens/s": _cell(record.tokens_per_s, ".1f"),
                "speed-up": speedup,
                "weights GB": _cell(record.weight_bytes and record.weight_bytes / GB),
                "running GB": _cell(derived.peak_above_bytes / GB),
                "loading GB": _cell(derived.load_above_bytes / GB),
                "GB/s": _cell(record.moved_bytes_per_s and record.moved_bytes_per_s / GB, ".1f"),
                "of limit": _cell(derived.limit_share, ".0%"),
                "perplexity": _cell(record.perplexity),
                "Δ nll (nats)": interval(record.nll_delta, record.nll_delta_ci95, "+.4f"),
                "same token": _cell(record.agreement, ".1%"),
                "note": "; ".join(notes).translate(PLAIN),
            }
        )
    return pd.DataFrame(rows).set_index("variant").rename_axis(None)


def verdict(record: Record) -> str:
    """One sentence on a variant's speed and quality against its baseline, from its record."""
    if record.status != "ok":
        return f"{record.variant}: {record.status} here ({record.reason})."
    if record.baseline is None or record.speedup is None:
        return f"{record.variant}: no speed to compare."
    gain = timing.Ratio(record.speedup, *(record.speedup_ci95 or (None, None)))
    times = interval(gain.value, gain[1:])
    sentence = (
        f"{record.variant} against {record.baseline}: {gain.verdict}, {times} times the speed"
    )
    if record.nll_delta is None:
        return sentence + "."
    low, high = record.nll_delta_ci95 or (-math.inf, math.inf)
    change = "no measurable loss of quality"
    if low > 0:
        change = "measurably worse"
    elif high < 0:
        change = "measurably better"
    nats = interval(record.nll_delta, record.nll_delta_ci95, "+.4f")
    return f"{sentence}; {change} ({nats} nats a token)."
