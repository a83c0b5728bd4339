"""Whatever is in a file or behind `-p`: read, or refused by ValueError in one sentence.

A thousand cases of each kind. Most begin as something valid, in which one or two places are then
something else; the rest is text.
"""

import copy
import json
import math

import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from helpers import results
from helpers.series import anatomy, matrix, parameters, report, run

THOUSAND = settings(
    max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
LENGTH = 2000  # characters of the longest refusal: what was given stands in it
NUMBERS = [0, -1, 1, 2, 3, 10**30, 10**400, 0.5, 1e308, -0.0, math.inf, math.nan]
WORDS = ["", "nan", "1e-3", "cpu", "cuda:x", "ok", "a/b", "../x", "\0", "~", "[", "{", "é" * 300]
scalars = st.sampled_from(NUMBERS) | st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from(NUMBERS), st.sampled_from(WORDS),
)  # fmt: skip
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)


def places(content, prefix=()):
    """The path of everything inside a nest of lists and dicts."""
    keys = ()
    if isinstance(content, dict):
        keys = list(content)
    elif isinstance(content, list):
        keys = range(len(content))
    for key in keys:
        yield (*prefix, key)
        yield from places(content[key], (*prefix, key))


@st.composite
def altered(draw, valid: list):
    """One of the valid contents, with one or two of its places lost, renamed or something else."""
    content = copy.deepcopy(draw(st.sampled_from(valid)))
    for _ in range(draw(st.integers(1, 2))):
        known = list(places(content))
        outer = [way for way in known if len(way) < 4]  # fields rather than items of their lists
        *way, last = draw(st.sampled_from(outer) | st.sampled_from(known))
        inner = content
        for key in way:
            inner = inner[key]
        action = draw(st.sampled_from(["set", "set", "set", "lose", "add"]))
        if action == "set":
            inner[last] = draw(anything)
        elif action == "lose":
            del inner[last]
        elif isinstance(inner, dict):
            inner[draw(st.text(max_size=4))] = draw(anything)
        if not list(places(content)):
            break
    return content


def in_one_sentence(refusal: ValueError) -> None:
    """A refusal is one line, of a length that is read."""
    said = str(refusal)
    assert said and "\n" not in said and len(said) < LENGTH, said


def write(path, content) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")


def a_file() -> dict:
    """A results file of two rows, one of them with everything a row has."""
    place = report.committed()
    lesson = place.lessons["01_mixed_precision"]
    content = json.loads(lesson.model_dump_json(by_alias=True))
    content["records"] = content["records"][:2]
    for record in content["records"]:
        for name, value in record.items():
            if isinstance(value, list):
                record[name] = value[:2]
    return content


FILE = a_file()


@THOUSAND
@given(content=altered([FILE]) | anything | st.text(max_size=40))
def test_a_results_file_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "01_mixed_precision.json"
    write(path, content)
    try:
        lesson = results.read(path)
    except ValueError as refusal:
        in_one_sentence(refusal)
        return
    assert results.read(path) == lesson
    for record in lesson.records:
        results.verdict(record)
    if lesson.records:
        rows = results.frame(lesson.records)
        assert len(results.table(lesson.records)) == len(rows) == len(lesson.records)
        assert not rows["tokens_per_s"].dropna().le(0).any()


@THOUSAND
@given(
    content=altered(
        [
            {
                "schema": 2,
                "hardware": "AMD EPYC, 2 cores",
                "torch": "2.13.0",
                "devices": {
                    "cpu": {
                        "bandwidth_bytes_per_s": 8e10,
                        "bandwidth_spread": 0.04,
                        "bandwidth_readings": 12,
                        "flops_per_s": {"float32": 2e11},
                        "launch_s": None,
                    }
                },
            }
        ]
    )
    | anything
    | st.text(max_size=40)
)
def test_machine_json_is_read_or_left_aside(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    write(folder / "machine.json", content)
    limits = results.read_limits(folder)
    if limits is not None:
        record = results.Record.model_validate(FILE["records"][0])
        ceiling = results.decode_ceiling(record, limits)
        assert math.isnan(ceiling) or 0 < ceiling < math.inf


DEFAULTS = {"RATE": 0.1, "ON": True, "SIZES": [1, 2], "NAMES": [], "NAMED": ["a"]}
for notebook in run.notebooks():  # the parameters of all lessons, and one of each kind
    DEFAULTS |= run.known_parameters(notebook)


def of_the_kind(value, default) -> bool:
    """Has a parameter the type of its default, with numbers that can be counted with?"""
    if isinstance(value, list):
        numbers = bool(default) and not isinstance(default[0], str)
        return all(0 <= one < math.inf for one in value) if numbers else True
    if isinstance(value, float):
        return math.isfinite(value)
    return type(value) is type(default)


@THOUSAND
@given(data=st.data())
def test_a_parameter_is_typed_or_refused(data):
    name = data.draw(st.sampled_from(sorted(DEFAULTS)))
    value = data.draw(anything)
    try:
        taken = parameters.typed(name, value, DEFAULTS[name])
    except ValueError as refusal:
        in_one_sentence(refusal)
        return
    assert DEFAULTS[name] is None or of_the_kind(taken, DEFAULTS[name])


@THOUSAND
@given(data=st.data())
def test_what_is_typed_on_the_command_line_is_taken_or_refused(data):
    name = data.draw(st.sampled_from([*sorted(DEFAULTS), "SPEED", "", "1", "\0"]))
    text = data.draw(st.text(max_size=12) | anything.map(str))
    pair = data.draw(st.sampled_from([f"{name}={text}", text]))
    try:
        taken = run.parse_parameters([pair], DEFAULTS)
    except ValueError as refusal:
        in_one_sentence(refusal)
        return
    ((name, value),) = taken.items()
    assert DEFAULTS[name] is None or of_the_kind(value, DEFAULTS[name])


MATRIX = {
    "models": ["auto", "random:tiny-llama"],
    "lessons": ["01"],
    "parameters": {"SEED": [0, 1], "EVAL_TOKENS": [48]},
    "profile": "smoke",
    "minutes": 5,
    "cpus": 1,
    "gpus": 0.5,
}


@THOUSAND
@given(content=altered([MATRIX]) | st.text(max_size=40) | anything)
def test_a_matrix_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "matrix.yaml"
    text = content if isinstance(content, str) else yaml.safe_dump(content)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        described = matrix.read(path)
    except ValueError as refusal:
        in_one_sentence(refusal)
        return
    for cell in described.cells:
        assert 0 < cell.limit_s < math.inf and cell.profile in run.PROFILES
        assert all(isinstance(pair, str) for pair in cell.parameters)
        assert len(cell.name.encode()) <= 255
    assert 0 <= described.gpus < math.inf and 0 < described.cpus < math.inf


SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
SHAPE |= {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 128}
CONFIGURATIONS = [
    SHAPE | {"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}},
    SHAPE | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    SHAPE | {"model_type": "gemma2", "head_dim": 8, "sliding_window": 16},
    {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64},
]


def huge(number) -> bool:
    return isinstance(number, (int, float)) and number > 1e6


@THOUSAND
@given(content=altered(CONFIGURATIONS) | anything | st.text(max_size=40))
def test_a_configuration_is_described_or_refused(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "a model"
    folder.mkdir(exist_ok=True)
    write(folder / "config.json", content)
    # transformers makes a list of a billion layers while it reads them: not tried
    assume(not (isinstance(content, dict) and huge(content.get("num_hidden_layers"))))
    anatomy.describe.cache_clear()
    try:
        model = anatomy.describe(str(folder))
    except ValueError as refusal:
        in_one_sentence(refusal)
        return
    assert all(tensors.rows >= 0 and tensors.columns >= 0 for tensors in model.tensors)
    assert 0 < model.experts_used <= 1
