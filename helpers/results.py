"""Records: build, save, load, to a pandas DataFrame (their schema stands in `helpers.schema`)."""

import datetime
import os
import tempfile
from pathlib import Path

import pandas as pd
import torch
from pydantic import ValidationError

from helpers import limits, machine, memory, models, quality, timing
from helpers.schema import (
    COMPARED,
    LIMIT,
    MEMORY,
    PAIRED,
    QUALITY,
    SPEED,
    Pair,
    Record,
    Results,
    Run,
)

__all__ = ["COMPARED", "LIMIT", "MEMORY", "PAIRED", "QUALITY", "SPEED"]

ROOT = Path(__file__).resolve().parent.parent


def null(reason: str, *fields: str) -> dict[str, str]:
    """Reasons for fields that are null: `null("not applicable", *results.QUALITY)`."""
    return dict.fromkeys(fields, reason)


def record(
    technique: str,
    variant: str,
    model,
    *,
    series: timing.Series | None = None,
    baseline: str | None = None,
    baseline_series: timing.Series | None = None,
    peak: memory.Peak | None = None,
    scored: quality.Quality | None = None,
    text: models.Text | None = None,
    bandwidth: float | None = None,
    weight_bytes: int | None = None,
    kv_cache_bytes: int | None = None,
    reasons: dict[str, str] | None = None,
    **fields,
) -> Record:
    """Put together what the helpers measured of one variant.

    Parameters
    ----------
    model : the MODEL parameter (for its name and revision).
    series, baseline_series : runs of the variant and, where it has a baseline, of that, in pairs.
    kv_cache_bytes : at the mean length of the generation, all sequences.
    fields : everything else that a record has (dtype, device, seed, details, ...).

    Raises pydantic.ValidationError when a measured value is null without a reason.
    """
    name, revision = models.identity(model)
    values = {
        "technique": technique,
        "id": variant,
        "variant": variant,
        "baseline": baseline,
        "model": name,
        "model_revision": revision,
        "threads": torch.get_num_threads(),
        "affinity": sorted(os.sched_getaffinity(0)),
        "engine_version": machine.versions().get(fields.get("engine", "transformers")),
        "weight_bytes": weight_bytes,
        "kv_cache_bytes": kv_cache_bytes,
        "bandwidth_bytes_per_s": bandwidth,
    }
    if series is not None:
        values |= _timed(series, baseline, baseline_series)
    if peak is not None:
        values |= {
            "resident_before_bytes": peak.resident_before_bytes,
            "peak_bytes": peak.peak_bytes,
            "peak_kind": peak.kind,
        }
    if scored is not None:
        values |= {
            "perplexity": scored.perplexity,
            "nll_delta": scored.nll_delta,
            "nll_delta_ci95": scored.nll_delta_ci95,
            "agreement": scored.agreement,
            "kl_divergence": scored.kl_divergence,
            "eval_text": text.label if text else None,
            "eval_tokens": scored.tokens,
            "eval_seq_len": scored.seq_len,
        }
    if weight_bytes and kv_cache_bytes is not None and bandwidth:
        values["limit_tokens_per_s"] = limits.decode_limit(
            weight_bytes, kv_cache_bytes, bandwidth, fields.get("batch_size", 1)
        )
    known = null("one pair or window gives no interval", "speedup_ci95", "nll_delta_ci95") | (
        reasons or {}
    )
    if baseline is None:
        known |= null("this is the baseline", *PAIRED, *COMPARED)
    for group, source in (
        (SPEED + PAIRED, series),
        (("resident_before_bytes", "peak_bytes", "peak_kind"), peak),
        (QUALITY + COMPARED, scored),
    ):
        known = known if source is not None else null("not measured", *group) | known
    values |= fields
    values["details"] = (peak.details if peak else {}) | values.get("details", {})
    known = {field: why for field, why in known.items() if values.get(field) is None}
    return Record(**values, reasons=known)


def _timed(series: timing.Series, baseline: str | None, base: timing.Series | None) -> dict:
    """A record's fields that come from timed runs."""
    values = {
        "status": series.status,
        "reason": series.reason,
        "warmup_s": [run.latency_s for run in series.warmup],
        "latency_s": series.latency_s,
        "ttft_s": [run.ttft_s for run in series.runs],
        "inter_token_s": [t for run in series.runs for t in run.inter_token_s],
        "warnings": timing.warnings(series.latency_s, base.latency_s if base else series.latency_s),
    }
    if series.status == "ok" and series.runs:
        first = series.runs[0]
        values |= {name: series.median(name) for name in SPEED}
        values |= {
            "prompt_tokens": first.prompt_tokens,
            "new_tokens": first.new_tokens,
            "batch_size": first.batch_size,
        }
        if baseline is not None and base is not None and base.runs:
            gain = timing.ratio(base.latency_s, series.latency_s)
            values |= {
                "speedup": gain.value,
                "speedup_ci95": None if gain.low is None else (gain.low, gain.high),
                "pairs": [
                    Pair(baseline=baseline, baseline_s=b, variant_s=v)
                    for b, v in zip(base.latency_s, series.latency_s, strict=True)
                ],
            }
    return values


def check(results_dir: str = "", **positive: int) -> None:
    """Refuse bad parameters before anything long starts.

    positive : parameters that must be at least 1, by name. Raises ValueError in one sentence that
        names the first.
    """
    for name, value in positive.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")
    results_folder(results_dir)


def results_folder(results_dir: str = "") -> Path:
    """`results_dir` or the project's own `notebooks/results`; made, and seen to be writable.

    Raises ValueError in one sentence when nothing can be written there.
    """
    folder = Path(results_dir) if results_dir else ROOT / "notebooks" / "results"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"RESULTS_DIR={str(folder)!r} cannot be written to: {error.strerror}."
        ) from error
    return folder


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


def save(lesson: str, records: list[Record], parameters: dict, results_dir: str = "") -> Path:
    """Validate and write `<results>/<machine>/<lesson>.json`, atomically; returns its path.

    lesson : file name without ending ("01_mixed_precision"). A file already there that does not
        read as results is renamed aside (`.refused-N`), never overwritten unseen.
    """
    found = Results(
        machine=machine.describe(),
        records=records,
        run=Run(
            date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            profile=os.environ.get("SEVEN_PROFILE", "full"),
            commit=machine.commit(),
            parameters=parameters,
        ),
    )
    path = results_folder(results_dir) / found.machine.slug / f"{lesson}.json"
    if path.exists():
        try:
            load(path)
        except ValueError as error:
            aside = next(
                p
                for n in range(1, 1000)
                if not (p := path.with_name(f"{path.name}.refused-{n}")).exists()
            )
            path.rename(aside)
            print(f"{error} It is kept as {aside.name}.")
    write_atomically(path, found.model_dump_json(by_alias=True, indent=1) + "\n")
    return path


def load(path: Path) -> Results:
    """Read one results file. Raises ValueError in one sentence that names the file and what is
    wrong with it.
    """
    path = Path(path)
    try:
        return Results.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(f"{path.name} is refused as results: {where}: {first['msg']}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} cannot be read: {error}.") from error


def reference_slug(results_dir: str = "") -> str:
    """This machine, if it has results; else the only machine that has; else this machine."""
    base = Path(results_dir) if results_dir else ROOT / "notebooks" / "results"
    there = sorted({path.parent.name for path in base.glob("*/*.json")})
    return there[0] if len(there) == 1 else machine.slug()


def load_all(
    results_dir: str = "", slug: str | None = None
) -> tuple[dict[str, Results], list[str]]:
    """All results of one machine (this one by default), by lesson; a sentence for each file that
    was refused.
    """
    folder = (Path(results_dir) if results_dir else ROOT / "notebooks" / "results") / (
        slug or machine.slug()
    )
    found, problems = {}, []
    for path in sorted(folder.glob("*.json")):
        try:
            found[path.stem] = load(path)
        except ValueError as error:
            problems.append(str(error))
    return found, problems


def frame(records: list[Record]) -> pd.DataFrame:
    """One row a record, in order, with derived columns.

    limit_share : decode speed over the bandwidth limit.
    same_engine : the baseline ran in the same engine, so that the ratio is the technique's; true
        for a baseline.
    headline : a row for headline charts: no sweep, and no CPU processes standing in for GPUs.
    """
    table = pd.DataFrame([r.model_dump() for r in records])
    number = {
        c: pd.to_numeric(table[c])
        for c in ("decode_tokens_per_s", "limit_tokens_per_s", "tokens_per_s")
    }
    table["limit_share"] = number["decode_tokens_per_s"] / number["limit_tokens_per_s"]
    engine = {(r.technique, r.id): r.engine for r in records}
    table["same_engine"] = [
        r.baseline is None or engine.get((r.technique, r.baseline)) == r.engine for r in records
    ]
    table["headline"] = [
        r.sweep is None and not (r.world_size > 1 and r.device == "cpu") for r in records
    ]
    return table
