"""One machine's records in one file: packed, read by 08, refused where it is anything else."""

import os
import zipfile

import pytest
from test_report import write
from test_results import a_record

from helpers import results
from helpers.series import bundle, report


def packed(folder, slug: str = "gpu"):
    """A bundle of a machine with two lessons, a quick run beside them, and what it can do."""
    base = folder / f"results of {slug}"
    write(base / slug / "tiny", "01_mixed_precision", a_record())
    write(base / slug / "tiny", "02_bfloat16", a_record(technique="bfloat16"))
    write(base / slug / "tiny" / "smoke", "03_quantization", a_record())
    (base / slug / "tiny" / "figures").mkdir()
    (base / slug / "tiny" / "figures" / "notes.json").write_text("{}")
    limits = results.MachineLimits(hardware=slug, torch="t")
    results.write_atomically(base / slug / "machine.json", limits.model_dump_json(by_alias=True))
    return bundle.pack(base, slug, folder / f"{slug}.zip")


def test_a_bundle_reads_as_the_folder_does(tmp_path):
    path = packed(tmp_path)
    assert sorted(zipfile.ZipFile(path).namelist()) == [
        "gpu/machine.json",
        "gpu/tiny/01_mixed_precision.json",
        "gpu/tiny/02_bfloat16.json",
    ]
    found, sentences = report.load([], [], str(path))
    there, same = report.load([], [], str(tmp_path / "results of gpu"))
    assert sentences == same and list(found) == list(there) == ["gpu · tiny"]
    assert found["gpu · tiny"].records == there["gpu · tiny"].records
    assert found["gpu · tiny"].limits.hardware == "gpu"
    assert report.figures_folder(found).is_relative_to(results.base_folder())


def test_several_bundles_show_all_their_machines(tmp_path):
    paths = [str(packed(tmp_path, slug)) for slug in ("gpu", "cpu")]
    found, _ = report.load([], [], os.pathsep.join(paths))
    assert list(found) == ["cpu · tiny", "gpu · tiny"]
    found, _ = report.load(["gpu"], [], os.pathsep.join(paths))
    assert list(found) == ["gpu · tiny"]
    with pytest.raises(ValueError, match=r"another bundle holds gpu/.* too: show one of them\.$"):
        report.load([], [], os.pathsep.join([paths[0], paths[0]]))
    with pytest.raises(ValueError, match=r"^none\.zip is refused as a bundle.*No such file"):
        report.load([], [], os.pathsep.join([paths[0], "none.zip"]))


def foreign(path, entries: dict):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in entries.items():
            archive.writestr(name, text)
    return path


RECORD = "gpu/tiny/01_mixed_precision.json"


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"../../escaped.json": "{}"}, "'../../escaped.json', which is no record"),
        ({"gpu/../01_a.json": "{}"}, "which is no record"),
        ({"/gpu/tiny/01_a.json": "{}"}, "which is no record"),
        ({"gpu/tiny/run.sh": "rm"}, "which is no record"),
        ({"gpu/machine.json": "{}"}, "it holds no records"),
        ({}, "it holds no records"),
        ({RECORD: '{"schema": 1, "records": []}'}, "first edition"),
        ({RECORD: '{"schema": 2, "records": []}'}, "machine: Field required"),
        ({RECORD: "{"}, "cannot be read as results"),
        ({RECORD: b"\xff\xfe"}, "codec can't decode"),
    ],
)
def test_what_is_no_bundle_is_refused_in_one_sentence(tmp_path, entries, said):
    path = foreign(tmp_path / "theirs.zip", entries)
    with pytest.raises(
        ValueError, match=r"^theirs\.zip is refused as a bundle of results"
    ) as error:
        report.load([], [], str(path))
    assert said in str(error.value) and "\n" not in str(error.value)
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["theirs.zip"]


def test_a_damaged_or_too_large_bundle_is_refused(tmp_path, monkeypatch):
    path = packed(tmp_path)
    content = bytearray(path.read_bytes())
    content[200] ^= 255
    damaged = tmp_path / "damaged.zip"
    damaged.write_bytes(content)
    cut = tmp_path / "cut.zip"
    cut.write_bytes(path.read_bytes()[:300])
    for file in (damaged, cut):
        with pytest.raises(ValueError, match=f"^{file.name} is refused as a bundle of results"):
            report.load([], [], str(file))
    monkeypatch.setattr(bundle, "MOST_BYTES", 100)
    with pytest.raises(ValueError, match="it holds more than 1e-07 GB"):
        report.load([], [], str(path))


def test_the_command_packs_a_machine_or_says_why_not(tmp_path, capsys):
    packed(tmp_path)
    base, target = str(tmp_path / "results of gpu"), tmp_path / "mine.zip"
    assert bundle.main(["gpu", "--results", base, "--to", str(target)]) == 0
    assert target.read_bytes()[:2] == b"PK"
    assert bundle.main(["nowhere", "--results", base]) == 2
    assert "has no records of nowhere (of: gpu): run the lessons first." in capsys.readouterr().err
