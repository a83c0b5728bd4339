"""The schema of a record and of a results file (pydantic); exported as JSON Schema."""

import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

TECHNIQUES = (
    "mixed_precision",
    "bfloat16",
    "quantization",
    "adapters",
    "pruning",
    "continuous_batching",
    "multiple_gpus",
)
SPEED = ("tokens_per_s", "decode_tokens_per_s", "prefill_tokens_per_s")
PAIRED = ("speedup", "speedup_ci95")
MEMORY = ("weight_bytes", "kv_cache_bytes", "resident_before_bytes", "peak_bytes", "peak_kind")
QUALITY = ("perplexity", "eval_text", "eval_tokens", "eval_seq_len")
COMPARED = ("nll_delta", "nll_delta_ci95", "agreement", "kl_divergence")
LIMIT = ("bandwidth_bytes_per_s", "limit_tokens_per_s")
NULLABLE = SPEED + PAIRED + MEMORY + QUALITY + COMPARED + LIMIT

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Bytes = Annotated[int, Field(ge=0)]
Scalar = bool | int | Number | str | None


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants", protected_namespaces=())


class Pair(Strict):
    """Run i of a variant beside run i of its baseline, whole latencies."""

    baseline: str
    baseline_s: Seconds
    variant_s: Seconds


class Record(Strict):
    """One variant, measured. SI units in names; a null measured value is explained in `reasons`."""

    technique: Literal[TECHNIQUES]
    id: str
    variant: str
    baseline: str | None = None
    sweep: str | None = None
    status: Literal["ok", "oom", "unsupported"] = "ok"
    reason: str | None = None
    engine: str = "transformers"
    engine_version: str | None = None
    threads: int
    affinity: list[int]
    world_size: int = 1
    model: str
    model_revision: str | None = None
    dtype: str
    device: str
    batch_size: int = 1
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    seed: int | None = None
    warmup_s: list[Seconds] = []
    latency_s: list[Seconds] = []
    ttft_s: list[Seconds] = []
    inter_token_s: list[Seconds] = []
    pairs: list[Pair] = []
    tokens_per_s: Positive | None = None
    decode_tokens_per_s: Positive | None = None
    prefill_tokens_per_s: Positive | None = None
    speedup: Positive | None = None
    speedup_ci95: tuple[Positive, Positive] | None = None
    weight_bytes: Bytes | None = None
    kv_cache_bytes: Bytes | None = None
    resident_before_bytes: Bytes | None = None
    peak_bytes: Bytes | None = None
    peak_kind: str | None = None
    perplexity: Positive | None = None
    nll_delta: Number | None = None
    nll_delta_ci95: tuple[Number, Number] | None = None
    agreement: Annotated[float, Field(ge=0, le=1)] | None = None
    kl_divergence: Number | None = None
    eval_text: str | None = None
    eval_tokens: int | None = None
    eval_seq_len: int | None = None
    bandwidth_bytes_per_s: Positive | None = None
    limit_tokens_per_s: Positive | None = None
    warnings: list[str] = []
    reasons: dict[str, str] = {}
    details: dict[str, Scalar | list[Scalar]] = {}

    @model_validator(mode="after")
    def _nulls_are_explained(self):
        if self.status != "ok" and not self.reason:
            raise ValueError(f"{self.id}: status {self.status} without a reason")
        if self.status == "ok":
            bare = [f for f in NULLABLE if getattr(self, f) is None and f not in self.reasons]
            if bare:
                raise ValueError(f"{self.id}: null without a reason: {', '.join(bare)}")
        return self


class Run(Strict):
    """When and how the records were made."""

    date: str
    profile: str
    commit: str | None
    parameters: dict[str, Scalar | list[Scalar]]


class Gpu(Strict):
    name: str
    memory_bytes: Bytes
    compute_capability: str


class Machine(Strict):
    """The machine as `helpers.machine.describe` tells it."""

    slug: str
    architecture: str
    cpu: str
    cores: int
    instruction_sets: list[str]
    memory_bytes: Bytes
    gpus: list[Gpu]
    os: str
    versions: dict[str, str]


class Results(Strict):
    """One file: the records of one lesson on one machine."""

    schema_: Literal[1] = Field(1, alias="schema")
    machine: Machine
    run: Run
    records: list[Record]

    @model_validator(mode="after")
    def _ids_fit(self):
        ids = [r.id for r in self.records]
        if len(ids) != len(set(ids)):
            raise ValueError("record ids are not unique")
        named = {r.baseline for r in self.records} | {
            p.baseline for r in self.records for p in r.pairs
        }
        if missing := named - {*ids, None}:
            raise ValueError(f"baselines that are no record here: {', '.join(sorted(missing))}")
        return self


def json_schema() -> str:
    """The schema of a results file as JSON Schema, as `helpers/data/results.schema.json` holds it."""
    return json.dumps(Results.model_json_schema(by_alias=True), indent=1) + "\n"
