"""Do the notebooks keep the contract? Read, not run: form, figures typed by hand, stamps."""

import ast
import inspect
import re
import statistics

import nbformat
import pytest

from helpers.series import run, stamps

SERIES = run.notebooks()
DEEPER = run.notebooks(deeper=True)
ALL = SERIES + DEEPER
LESSONS = SERIES[:-1]
HEADINGS = [
    "## The idea",
    "## What should happen",
    "## Baseline",
    "## The technique",
    "## Is it still the same model?",
    "## What happened",
    "## In practice",
    "## Exercises",
    "## Further reading",
]
COMMON = {
    "MODEL",
    "DEVICE",
    "NEW_TOKENS",
    "REPEATS",
    "WARMUP",
    "EVAL_TOKENS",
    "SEED",
    "RESULTS_DIR",
    "FIGURES_DIR",
}
TYPED = re.compile(
    r"\d+(?:[.,]\d+)?\s*(?:x|×|times|%)\s+(?:faster|slower|smaller|larger|less|more)"
    r"|\d+(?:\.\d+)?\s*(?:tok|tokens?)\s*/\s*s",
    re.I,
)
LOCAL = re.compile(r"(?<![\w:/.])/(?:root|home|tmp|work|Users|mnt|opt)/[\w.-]+|[A-Z]:\\\\Users")


def stem(path):
    return path.stem


@pytest.fixture(params=ALL, ids=stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, 4)


@pytest.fixture(params=LESSONS, ids=stem)
def lesson(request):
    return nbformat.read(request.param, 4)


def code(notebook):
    return [c for c in notebook.cells if c.cell_type == "code"]


def prose(notebook):
    return "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")


def tagged(notebook):
    return [c for c in code(notebook) if "parameters" in c.metadata.get("tags", [])]


def test_it_is_a_valid_notebook_of_reasonable_size(notebook):
    nbformat.validate(notebook)
    assert len(nbformat.writes(notebook)) < 400_000
    assert notebook.metadata.kernelspec.name == "python3"


def test_bootstrap_is_the_same_everywhere(notebook):
    assert code(notebook)[0].source == code(nbformat.read(ALL[0], 4))[0].source


def test_parameters_are_literals_with_their_unit(notebook):
    assert len(tagged(notebook)) == 1
    for statement in ast.parse(tagged(notebook)[0].source).body:
        ast.literal_eval(statement.value)
    assert all(
        "#" in row
        for row in tagged(notebook)[0].source.splitlines()
        if row.strip() and not row.startswith("SEED")
    )


def test_cells_are_short_and_explained(path, notebook):
    lines = [len([row for row in c.source.splitlines() if row.strip()]) for c in code(notebook)]
    assert max(lines) <= 25
    if path not in DEEPER:  # a scheme by hand is a function of ten lines and more
        assert statistics.median(lines) <= 8
    kinds = "".join(c.cell_type[0] for c in notebook.cells if c.source.strip())
    assert "ccc" not in kinds


def test_a_lesson_has_the_skeleton(lesson):
    text = prose(lesson)
    for needed in (
        "What you'll do",
        "What you'll learn",
        "What you'll need",
        "*Series:",
        "**Next:**",
    ):
        assert needed in text
    found = [h for h in re.findall(r"^## .*$", text, re.M) if h in HEADINGS]
    assert found == HEADINGS
    names = {t.id for s in ast.parse(tagged(lesson)[0].source).body for t in s.targets}
    assert names >= COMMON
    assert len(code(lesson)) >= 12


@pytest.mark.parametrize("path", DEEPER, ids=stem)
def test_a_deeper_notebook_has_its_skeleton(path):
    notebook = nbformat.read(path, 4)
    number = int(path.stem[:2])
    assert notebook.cells[0].source.startswith(f"# {number}, deeper · ")
    text = prose(notebook)
    (lesson,) = [other for other in LESSONS if other.stem[:2] == path.stem[:2]]
    assert f"](../{lesson.name})" in text
    for heading in ("## What happened", "## In practice", "## Further reading"):
        assert f"\n{heading}\n" in text
    names = {t.id for s in ast.parse(tagged(notebook)[0].source).body for t in s.targets}
    assert names >= {"SEED", "RESULTS_DIR", "FIGURES_DIR"}
    source = "\n".join(cell.source for cell in code(notebook))
    if "results.open(" in source:  # its records lie in a file of its own name
        assert f'"{path.stem}"' in source


def test_no_measured_figure_is_typed(notebook):
    assert not TYPED.findall(prose(notebook))


def test_links_between_notebooks_lead_somewhere(path, notebook):
    links = re.findall(r"\]\(((?:[.\w]+/)*(?:\d\d_\w+\.ipynb|README\.md))\)", prose(notebook))
    for target in links:
        assert (path.parent / target).exists(), target


def test_outputs_bear_a_stamp(notebook):
    shown = [c for c in code(notebook) if c.outputs or c.execution_count]
    stamp = notebook.metadata.get("stamp")
    if shown:
        assert stamp is not None
        assert set(stamp) == {"code", "measuring", "machine", "date"}
    else:
        assert stamp is None


def test_outputs_are_clean(path):
    notebook = nbformat.read(path, 4)
    counts = [cell.execution_count for cell in code(notebook)]
    executed = [count for count in counts if count]
    assert executed == sorted(set(executed))
    if executed and not stamps.is_stale(path):
        assert counts == list(range(1, len(counts) + 1))
    for cell in code(notebook):
        assert cell.execution_count or not cell.outputs
        for output in cell.outputs:
            assert output.output_type != "error"
            data = output.get("data", {})
            shown = [value for mime, value in data.items() if mime.startswith("text/")]
            text = output.get("text", "") + "".join(shown)
            assert not LOCAL.search(text), LOCAL.search(text)
            assert "it/s]" not in text and "\r" not in text


def test_smoke_values_are_parameters_of_their_own_notebook(lesson):
    (cell,) = tagged(lesson)
    names = {target.id for row in ast.parse(cell.source).body for target in row.targets}
    smoke = lesson.metadata["smoke"]
    assert smoke and set(smoke) <= names


def test_all_stamps_are_of_one_machine():
    machines = {m["machine"] for p in ALL if (m := nbformat.read(p, 4).metadata.get("stamp"))}
    assert len(machines) <= 1
    assert machines <= {p.parent.name for p in (run.NOTEBOOKS / "results").glob("*/machine.json")}


def said(text):
    """A fault: this stands in the last cell of prose."""

    def spoil(notebook):
        cell = [c for c in notebook.cells if c.cell_type == "markdown"][-1]
        cell.source += "\n\n" + text

    return spoil


def typed(text, cell=1):
    """A fault: this stands in a cell of code, by default in that of the parameters."""

    def spoil(notebook):
        code(notebook)[cell].source += "\n" + text

    return spoil


def lost(text):
    """A fault: this stands nowhere."""

    def spoil(notebook):
        for cell in notebook.cells:
            cell.source = cell.source.replace(text, "")

    return spoil


def printed(text):
    """A fault: the last cell printed this."""

    def spoil(notebook):
        output = nbformat.v4.new_output("stream", text=text)
        code(notebook)[-1].outputs.append(output)

    return spoil


BAD = [
    (test_it_is_a_valid_notebook_of_reasonable_size, said("x" * 400_000)),
    (test_bootstrap_is_the_same_everywhere, typed("print()", cell=0)),
    (test_parameters_are_literals_with_their_unit, typed("LENGTH = 5")),
    (test_cells_are_short_and_explained, typed("print()\n" * 26, cell=2)),
    (test_a_lesson_has_the_skeleton, lost("## Is it still the same model?")),
    (test_a_lesson_has_the_skeleton, lost("SEED = 0")),
    (test_a_deeper_notebook_has_its_skeleton, lost("## In practice")),
    (test_no_measured_figure_is_typed, said("It is 2.5 times faster.")),
    (test_no_measured_figure_is_typed, said("It makes 31 tokens/s.")),
    (test_links_between_notebooks_lead_somewhere, said("[There](09_nowhere.ipynb)")),
    (test_outputs_bear_a_stamp, lambda notebook: notebook.metadata.pop("stamp")),
    (test_outputs_are_clean, printed("/home/somebody/model")),
    (test_outputs_are_clean, printed("3%|  | 1/30 [00:01<00:29, 1.0it/s]")),
    (
        test_smoke_values_are_parameters_of_their_own_notebook,
        lambda notebook: notebook.metadata.smoke.update(LENGTH=5),
    ),
]


@pytest.mark.parametrize(("rule", "spoil"), BAD)
def test_each_rule_finds_a_notebook_that_breaks_it(tmp_path, rule, spoil):
    deeper = rule is test_a_deeper_notebook_has_its_skeleton
    good = DEEPER[0] if deeper else LESSONS[0]
    bad = nbformat.read(good, 4)
    spoil(bad)
    asked = inspect.signature(rule).parameters
    given = {"path": good, "notebook": bad, "lesson": bad}
    if set(asked) == {"path"}:  # the rule reads the file
        given["path"] = tmp_path / good.name
        nbformat.write(bad, given["path"])
    with pytest.raises(AssertionError):
        rule(**{name: given[name] for name in asked})
