"""`build` meets bad pictures, a kill, other ranks, changed settings and a full disk."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from builds import Turned, build, celeba, coco, commoncanvas, files_of, journeydb, own_file, own_folder, styles
from PIL import Image
from sources import make_commoncanvas, photograph, save
from training.datasets import build as build_module
from training.datasets.build import BuildConfig, run
from training.datasets.index import Shards
from training.datasets.ledger import write_manifest
from training.datasets.shards import Tally
from training.datasets.sources.folders import LeftOutCount

ROOT = Path(__file__).resolve().parents[3]
SAMPLES = 30

# A build in a process of its own: its targets are the conditions upside down, each noted in a file. It can be told to
# kill itself when the N-th batch is asked for.
CHILD = """
import os, signal, sys
from pathlib import Path
from training.datasets.build import BuildConfig, run

source, out, notes, kill_at = sys.argv[1:]
calls = 0

def maker(conditions, prompts, seeds, contents):
    global calls
    calls += 1
    if calls == int(kill_at):
        os.kill(os.getpid(), signal.SIGKILL)
    with open(notes, "a") as file:
        file.writelines(f"{seed}\\n" for seed in seeds)
    return [condition.rotate(180) for condition in conditions]

targets = {"base": "base", "controlnet": "scribble", "size": 128, "batch_size": 2}
source = {"kind": "composition", "pictures": Path(source), "targets": targets}
run(BuildConfig(source=source, out=Path(out), samples_per_shard=5, size=96), maker)
"""


def start(tmp_path: Path, name: str, kill_at: int = 0, **environment: str) -> subprocess.Popen:
    """A build of the pictures in ``tmp_path / "source"`` into ``tmp_path / name``."""
    notes = tmp_path / f"{name}-{environment.get('RANK', 0)}.notes"
    command = [sys.executable, "-c", CHILD, str(tmp_path / "source"), str(tmp_path / name), str(notes), str(kill_at)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, text=True)


def made(tmp_path: Path, name: str, rank: int = 0) -> list[str]:
    return (tmp_path / f"{name}-{rank}.notes").read_text().split()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of pictures, and ``out``: a build of it that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    make_commoncanvas(folder / "source", SAMPLES)
    assert start(folder, "out").wait(120) == 0
    assert len(set(made(folder, "out"))) == len(made(folder, "out")) == SAMPLES
    return folder


def test_a_killed_build_goes_on_and_makes_nothing_twice(whole, tmp_path):
    shutil.copytree(whole / "source", tmp_path / "source")
    shutil.copytree(whole / "out", tmp_path / "out")
    settings = (whole / "out" / "settings.json").read_text().replace(str(whole), str(tmp_path))
    shutil.rmtree(tmp_path / "out")
    # Three of the 30 validate, in two batches; then shards of 5 in three batches: the 7th is the third shard's second.
    assert start(tmp_path, "out", kill_at=7).wait(120) == -signal.SIGKILL
    left = files_of(tmp_path / "out")
    assert [name for name in left if name.endswith(".tar")] == ["train-00000.tar", "validation-00000.tar"]
    assert any(name.startswith(".train-00001.tar.") for name in left), "a half-written shard"
    assert "manifest.json" not in left
    assert len(made(tmp_path, "out")) == 3 + 5 + 2
    assert start(tmp_path, "out").wait(120) == 0
    done = made(tmp_path, "out")
    assert len(done) == SAMPLES + 2 and len(set(done)) == SAMPLES, "only the interrupted shard's were made again"
    expected = files_of(whole / "out")
    resumed = files_of(tmp_path / "out")
    assert resumed.keys() == expected.keys()
    same = [name for name in expected if name not in ("manifest.json", "settings.json")]
    assert all(resumed[name] == expected[name] for name in same)
    assert resumed["settings.json"].decode() == settings
    targets = {"base": "base", "controlnet": "scribble", "size": 128, "batch_size": 7}
    source = {"kind": "composition", "pictures": tmp_path / "source", "targets": targets}
    run(
        BuildConfig(source=source, out=tmp_path / "out", samples_per_shard=5, size=96), lambda *_: pytest.fail("called")
    )
    assert files_of(tmp_path / "out") == resumed, "nothing is left to do"


def test_two_ranks_make_what_one_makes(whole, tmp_path):
    (tmp_path / "source").symlink_to(whole / "source")
    ranks = [start(tmp_path, "out", RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    one, two = made(tmp_path, "out", 0), made(tmp_path, "out", 1)
    assert len(one) == 3 + 5 + 5 and len(two) == 5 + 5 + 5 + 2 and not set(one) & set(two)
    expected, shared = files_of(whole / "out"), files_of(tmp_path / "out")
    assert shared.keys() == expected.keys()
    assert all(shared[name] == expected[name] for name in expected if name.endswith(".tar") or "blocks" in name)
    manifest = json.loads(shared["manifest.json"])
    assert manifest["shards"] == json.loads(expected["manifest.json"])["shards"]


def test_the_manifest_waits_for_the_last_rank(tmp_path, monkeypatch):
    source = journeydb(tmp_path / "source", 24)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    build(source, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    monkeypatch.setenv("RANK", "0")
    assert build(source, tmp_path / "out")["counts"] == {"validation": 2, "train": 22}


def spoil(folder: Path) -> dict[str, str]:
    """Four pictures that cannot be used, and why."""
    cut, page, empty, unnamed = sorted((folder / "imgs").rglob("*.jpg"))[:4]
    os.truncate(cut, cut.stat().st_size // 2)
    page.write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>")
    empty.write_bytes(b"")
    lines = [json.loads(line) for line in (folder / "train_anno.jsonl").read_text().splitlines()]
    for line in lines:
        if unnamed.name in line["img_path"]:
            line["prompt"] = None
    (folder / "train_anno.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    reasons = (
        (cut, "the picture cannot be read (image file is truncated"),
        (page, "it is no picture file in JPEG, PNG or WebP"),
        (empty, "it is no picture file in JPEG, PNG or WebP"),
        (unnamed, "it has no prompt"),
    )
    return {f"./{path.relative_to(folder / 'imgs').as_posix()}": why for path, why in reasons}


def test_a_few_bad_pictures_are_skipped_counted_and_named(tmp_path, capsys):
    source = journeydb(tmp_path / "source", 45)
    bad = spoil(tmp_path / "source")
    manifest = build(source, tmp_path / "out", max_skipped=0.1)
    skipped = {skip["name"]: skip["why"] for skip in manifest["skipped"]}
    assert skipped.keys() == bad.keys() and len(manifest["skipped"]) == 4
    assert all(why in skipped[name] for name, why in bad.items())
    assert sum(manifest["counts"].values()) == 41 == sum(shard["samples"] for shard in manifest["shards"])
    assert len(Shards(sorted((tmp_path / "out").glob("*.tar")), Tally(0))) == 41
    assert "; 4 skipped, named in its manifest." in capsys.readouterr().out
    assert build(source, tmp_path / "out", max_skipped=0.1) == manifest, "those of finished shards are not forgotten"


def test_the_manifest_is_told_of_by_the_command_alone(tmp_path, capsys):
    said = write_manifest(tmp_path, "own", {}, [], [], 0.0, LeftOutCount())
    assert said == f"{tmp_path}: 0 samples to train on and 0 to validate with, in 0 shards; 0 skipped."
    assert capsys.readouterr().out == ""


def test_too_many_bad_pictures_fail_the_build(tmp_path):
    source = journeydb(tmp_path / "source", 45)
    spoil(tmp_path / "source")
    with pytest.raises(ValueError, match=r"of \d+ items could not be used .*; mend the source, or raise --max-skipped"):
        build(source, tmp_path / "out", max_skipped=0.05)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert build(source, tmp_path / "out", max_skipped=0.1)["counts"]["train"] > 30, (
        "a larger share may be allowed later"
    )


def test_a_picture_without_edges_is_skipped(tmp_path):
    folder = tmp_path / "source"
    for name, colour in (("a", "grey"), ("b", "white")):
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (64, 64), colour).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("nothing at all")
    source = {"kind": "composition", "pictures": folder, "targets": {"base": "b", "controlnet": "c"}}
    with pytest.raises(ValueError, match=r"2 of 2 items could not be used \(\w.png: the picture has no edges"):
        run(BuildConfig(source=source, out=tmp_path / "out", validation=0), lambda *_: [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 128}, "holds samples built with size = 96, not 128; give it as it was"),
        ({"seed": 1}, "holds samples built with seed = 0, not 1"),
        ({"limit": 5}, "holds samples built with limit = None, not 5"),
        ({"samples_per_shard": 7}, "holds samples built with samples_per_shard = 5, not 7"),
        ({"prompts": "endpoint"}, "holds samples built with prompts = source, not endpoint"),
    ],
)
def test_a_changed_setting_is_named(tmp_path, change, message):
    source = journeydb(tmp_path / "source", 6)
    build(source, tmp_path / "out")
    before = files_of(tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        build(source, tmp_path / "out", **change)
    assert files_of(tmp_path / "out") == before
    assert build(source, tmp_path / "out", threads=1, max_skipped=0.5), "these may change"


def test_a_build_of_before_a_setting_was_there_goes_on(tmp_path):
    source = journeydb(tmp_path / "source", 6)
    build(source, tmp_path / "out")
    path = tmp_path / "out" / "settings.json"
    kept = json.loads(path.read_text())
    del kept["smallest_side"]
    path.write_text(json.dumps(kept))
    assert build(source, tmp_path / "out")
    path.write_text(json.dumps(kept))
    with pytest.raises(ValueError, match="smallest_side = .*, not 32"):
        build(source, tmp_path / "out", smallest_side=32)


def test_a_wrong_setting_may_be_mended_while_nothing_is_built(tmp_path):
    make_commoncanvas(tmp_path / "source", 6)
    targets = {"base": tmp_path / "mistyped", "controlnet": "scribble", "size": 128}
    source = {"kind": "composition", "pictures": tmp_path / "source", "targets": targets}
    with pytest.raises(ValueError, match="mistyped"):
        build(source, tmp_path / "out")
    targets |= {"base": "base", "size": 64}
    assert build(source, tmp_path / "out", Turned())["settings"]["source"]["targets"]["base"] == "base"
    (tmp_path / "out" / "manifest.json").unlink()
    for shard in (tmp_path / "out").glob("*.tar"):
        shard.unlink()
    targets |= {"base": "other", "size": 128}
    with pytest.raises(ValueError, match="holds samples built with source.targets.size = 64, not 128"):
        build(source, tmp_path / "out", Turned())  # the shards are noted, if lost


@pytest.mark.parametrize("make", [journeydb, styles, commoncanvas, coco, celeba, own_file, own_folder])
def test_a_build_goes_on_where_its_source_has_moved(tmp_path, make):
    source = make(tmp_path / "before")
    manifest = build(source, tmp_path / "out", Turned())
    assert manifest["counts"]["train"] > 2
    shard = tmp_path / "out" / "train-00000.tar"
    content = shard.read_bytes()
    shard.unlink()
    (tmp_path / "before").rename(tmp_path / "after")
    moved = {
        name: Path(str(value).replace(str(tmp_path / "before"), str(tmp_path / "after")))
        if isinstance(value, Path)
        else value
        for name, value in source.items()
    }
    assert build(moved, tmp_path / "out", Turned())["counts"] == manifest["counts"]
    assert shard.read_bytes() == content
    kept = json.loads((tmp_path / "out" / "settings.json").read_text())["source"]
    assert all(kept[name] == str(value) for name, value in moved.items() if isinstance(value, Path))


def test_a_changed_source_and_a_folder_of_others_are_told(tmp_path):
    source = journeydb(tmp_path / "source", 6)
    build(source, tmp_path / "out")
    save(tmp_path / "source" / "imgs" / "000" / "new.jpg", photograph("cat"))
    with open(tmp_path / "source" / "train_anno.jsonl", "a") as file:
        file.write(json.dumps({"img_path": "./000/new.jpg", "prompt": "new"}) + "\n")
    with pytest.raises(ValueError, match="The source has changed since the build in .*out began"):
        build(source, tmp_path / "out")
    (tmp_path / "out" / "settings.json").unlink()
    with pytest.raises(ValueError, match="holds shards that no build was begun with; name an empty folder"):
        build(source, tmp_path / "out")


def test_a_shard_that_was_lost_or_cut_is_made_again(tmp_path):
    source = journeydb(tmp_path / "source", 24)
    build(source, tmp_path / "out")
    expected = files_of(tmp_path / "out")
    (tmp_path / "out" / "train-00001.tar").unlink()
    os.truncate(tmp_path / "out" / "train-00002.tar", 1000)
    build(source, tmp_path / "out")
    assert files_of(tmp_path / "out") == expected


def test_a_disk_that_fills_up_leaves_only_whole_shards(tmp_path, monkeypatch):
    source = journeydb(tmp_path / "source", 24)
    written = []

    def write_shard(path, samples):
        written.append(path.name)
        if len(written) == 3:
            samples = fail_after(samples, 2)
        return real_write_shard(path, samples)

    def fail_after(samples, count):
        for number, sample in enumerate(samples):
            if number == count:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield sample

    real_write_shard = build_module.write_shard
    monkeypatch.setattr(build_module, "write_shard", write_shard)
    with pytest.raises(
        ValueError, match="The disk that holds .*out is full; make room and give the same command again"
    ):
        build(source, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "blocks",
        "settings.json",
        "train-00000.tar",
        "validation-00000.tar",
    ]
    monkeypatch.undo()
    assert build(source, tmp_path / "out")["counts"] == {"validation": 2, "train": 22}


def test_a_really_full_disk(tmp_path):
    """The same on a file system of 400 KiB, where the kernel lets us make one."""
    build(journeydb(tmp_path / "source", 24), tmp_path / "expected", size=0, validation=0)
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f"""
mount -t tmpfs -o size=400k tmpfs {disk} || exit 77
cd {tmp_path}
{sys.executable} -m training build --out disk/out --size 0 --validation 0 --samples-per-shard 5 \\
    replication --source.annotations source/train_anno.jsonl --source.images source/imgs
echo $? >code
ls -A disk/out >list
cp disk/out/*.tar .
"""
    unshared = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    try:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(unshared, env=environment, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        pytest.skip("unshare is not there")
    if not (tmp_path / "code").exists():
        pytest.skip(f"no small file system can be mounted: {done.stderr.strip()}")
    assert (tmp_path / "code").read_text().strip() == "1"
    message = done.stderr.splitlines()[-1]
    assert message.startswith("build: The disk that holds disk/out is full; make room and give the same command again")
    listed = (tmp_path / "list").read_text().split()
    shards = [name for name in listed if name.endswith(".tar")]
    assert shards and not any(name.startswith(".") for name in listed) and "manifest.json" not in listed
    for name in shards:
        assert (tmp_path / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
