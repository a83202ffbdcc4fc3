"""Configuration: files and overrides merged in order, and errors that name the key before anything starts."""

import re
from pathlib import Path

import pytest

from mediafm_ray.config.jobs import EmbedCatalogConfig
from mediafm_ray.config.loader import ConfigError, describe, profiles, read_config
from mediafm_ray.runs.command import parse

CONF = Path(__file__).parents[1] / "conf"


def read(*overrides, files=()):
    return read_config(EmbedCatalogConfig, [str(file) for file in files], overrides)


def test_later_files_and_overrides_win(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("frames: {per_shot: 3, size: 100}\nrun: {max_titles: 7}\n")
    second.write_text("frames: {per_shot: 4}\n")
    config = read("run.max_titles=9", files=[first, second])
    assert (config.frames.per_shot, config.frames.size, config.run.max_titles) == (4, 100, 9)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["frames.per_shots=3"], "there is no key frames.per_shots; did you mean per_shot?"),
        (["timed_text.languages=en"], "timed_text.languages: expected a list, such as timed_text.languages=[one,other]"),
        (["frame.per_shot=3"], "frame"),
        (["frames.per_shot=many"], "frames.per_shot"),
        (["run.max_failed_fraction=2"], "run.max_failed_fraction"),
        (["run.shards=0-256"], "run.shards must be two numbers from 0 to 255"),
        (["run.shards=9-3"], "run.shards must be two numbers"),
        (["run.shards=all"], "run.shards must be two numbers"),
        (["resources.encode_video.min_actors=3", "resources.encode_video.max_actors=2"], "min_actors"),
        (["resources.pools=[encode_video+write]"], "encode_video+write is not a part of"),
        (["resources.pools=[encode_vid]"], "encode_vid is not a part of"),
        (["resources.pools=[encode_video+encode_audio,encode_audio+encode_text]"], "resources.pools: a stage is in two pools"),
        (["catalog.uri"], "key=value"),
        (["frames=3"], "frames"),
        (["frames.per_shot=0"], "frames.per_shot"),
        (["frames.jpeg_quality=500"], "frames.jpeg_quality"),
        (["detector.threshold=7"], "detector.threshold"),
        (["fusion.modality_norm=l3"], "fusion.modality_norm"),
        (["media.max_damage=2"], "media.max_damage"),
        (["media.decoder=nvdec"], "media.decoder"),
        (["resources.write.num_cpus=-3"], "resources.write.num_cpus must be at least 0, is -3.0"),
        (["run.max_failed_fraction=.nan"], "run.max_failed_fraction must be at least 0 and at most 1, is nan"),
        (["video.precision=half"], "video.precision must be one of float32, bfloat16, is 'half'"),
        (["video.micro_batch=-1"], "video.micro_batch must be at least 0"),
        (["audio.threads=-1"], "audio.threads must be at least 0"),
        (["fusion.weights.audio=.inf"], "fusion.weights must be above 0 and finite, is inf"),
        (["detector.shortest_shot=9", "detector.longest_shot=9"], "detector.longest_shot (9) must be at least twice shortest_shot (9)"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(overrides, named):
    with pytest.raises(ConfigError, match=re.escape(named)):
        read(*overrides)


@pytest.mark.parametrize("sizes", ["one_gpu", "one_gpu_decode"])
def test_the_stages_of_one_gpu_fit_on_it(sizes):
    config = read(files=[CONF / "mediafm.yaml", CONF / f"{sizes}.yaml"])
    pools = {name: getattr(config.resources, name) for name in ("detect_shots", "encode_video", "encode_audio", "contextualise")}
    assert sum(pool.max_actors * pool.num_gpus for pool in pools.values()) <= 1
    computed = {
        "detect_shots": config.detector,
        "encode_video": config.video,
        "encode_audio": config.audio,
        "contextualise": config.contextualiser,
    }
    for name, options in computed.items():  # Ray hides the GPU from a stage that reserves no part of it
        assert (options.device == "cuda") == (pools[name].num_gpus > 0)
    assert config.media.decoder == "cpu" or pools["detect_shots"].num_gpus > 0


def test_a_value_on_the_command_line_is_not_repeated_in_errors():
    with pytest.raises(ConfigError) as caught:
        read("media.storage_optons.secret=hunter2")
    assert "media.storage_optons" in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "value"), [("000000000012", "000000000012"), ("12345678e123", "12345678e123"), ("'a b'", "a b"), ("", "")]
)
def test_text_is_taken_as_it_is_given_also_where_it_looks_like_a_number(given, value):
    assert read(f"text.model={given}").text.model == value


def test_a_text_may_be_set_to_nothing_where_that_is_its_default():
    assert read("storage.endpoint_url=http://somewhere", "storage.endpoint_url=").storage.endpoint_url == ""


def test_a_mistake_in_a_file_names_file_and_key(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("detector: {treshold: 0.4}\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml.*detector\.treshold"):
        read(files=[file])
    file.write_text("detector: [\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml"):
        read(files=[file])
    with pytest.raises(ConfigError, match=r"no such file"):
        read(files=[tmp_path / "absent.yaml"])


@pytest.mark.parametrize("profile", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_profiles_parse(profile):
    assert isinstance(read("catalog.uri=a", "output.uri=b", files=[profile]), EmbedCatalogConfig)


def test_profiles_are_found_by_name():
    assert read("run.max_titles=2", files=["mediafm"]) == read("run.max_titles=2", files=[CONF / "mediafm.yaml"])
    files = {str(file.relative_to(CONF).with_suffix("")) for file in CONF.rglob("*.yaml") if "kubernetes" not in file.parts}
    assert set(profiles()) == files - {"cluster/runtime_env"}
    parsed = parse("", EmbedCatalogConfig, ["--config", "offline", "cluster/gpu", "catalog.uri=v"])
    assert (parsed.catalog.uri, parsed.resources.detect_shots.node_resource) == ("v", "decode")


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("mediafn", "mediafm"),
        ("conf/mediafn.yaml", "mediafm"),
        ("elsewhere/mediafm.yaml", "mediafm"),
        ("conf/training/smal.yaml", "training/small"),
        ("", ""),
        ("..", ""),
    ],
)
def test_an_unknown_profile_lists_those_that_there_are(wrong, meant):
    with pytest.raises(ConfigError) as refused:
        read(files=[wrong])
    assert all(word in str(refused.value) for word in (wrong, *profiles()))
    assert ("did you mean" in str(refused.value)) == bool(meant)
    assert f"did you mean {meant}?" in str(refused.value) or not meant


def test_the_command_line_takes_files_and_overrides_in_any_order():
    profile = str(CONF / "offline.yaml")
    for arguments in (
        ["--config", profile, "catalog.uri=v", "output.uri=o"],
        ["catalog.uri=v", "output.uri=o", "--config", profile],
        ["catalog.uri=v", "--config", profile, "output.uri=o"],
    ):
        config = parse("", EmbedCatalogConfig, arguments)
        assert (config.catalog.uri, config.output.uri) == ("v", "o")
    with pytest.raises(ConfigError, match="output_uri"):
        parse("", EmbedCatalogConfig, ["--config", profile, "output_uri"])


def test_help_lists_every_key_with_a_meaning_and_its_bounds():
    lines = describe(EmbedCatalogConfig).splitlines()
    assert "  frames.jpeg_quality=90  (at least 1 and at most 95)" in lines
    assert "  run.log_format=text  (one of text, json)" in lines
    keys = [index for index, line in enumerate(lines) if line.startswith("  ") and not line.startswith("   ")]
    assert len(keys) > 40
    for index in keys:
        assert "=" in lines[index]
        assert lines[index + 1].startswith("      "), f"{lines[index]} has no meaning"
