"""Sound at the rate of the audio encoder, from the file to the stored vector, and the rate's part in the dataset version."""

import av
import numpy as np
import pyarrow as pa
import pytest

from mediafm_ray.config.jobs import EmbedCatalogConfig
from mediafm_ray.config.loader import read_config
from mediafm_ray.models import tiny
from mediafm_ray.models.clap import ClapEncoder
from mediafm_ray.pipeline import loop
from mediafm_ray.pipeline.rows import AUDIO, TitleRow, plan_table
from mediafm_ray.pipeline.stages import EncodeAudio
from mediafm_ray.runs.plan import describe_model, make_plan, prepare_output
from mediafm_ray.spec import MODALITIES, recipe_of
from mediafm_ray.storage.dataset import EmbeddingDataset
from tests.videos import make_video

RATE = 48_000
CLICKS = [0.52, 1.25, 1.55]  # seconds


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("clap")
    for name, make in (("audio", tiny.make_clap), ("video", tiny.make_clip), ("text", tiny.make_bert)):
        make(root / name)
    (root / "videos").mkdir()
    sound = {"clicks": CLICKS, "sound_codec": "pcm_s16le", "sound_rate": 44_100, "sound_layout": "stereo", "sound_s": 2.0}
    make_video(root / "videos" / "a.mkv", [20, 40], b_frames=0, size=(160, 96), **sound)
    encoders = ["audio.encoder=clap", "video.encoder=clip", *(f"{name}.weights={root}/{name}" for name in MODALITIES)]
    places = [f"catalog.uri={root}/videos", f"output.uri={root}/out"]
    return read_config(EmbedCatalogConfig, [], [*places, *encoders, "fusion.modality_norm=none", "contextualiser.checkpoint="])


def resampled(path):
    """(N,) int16: the file's sound as PyAV's resampler makes it, and silence behind it."""
    resampler = av.AudioResampler(format="s16", layout="mono", rate=RATE)
    with av.open(path) as container:
        frames = list(container.decode(audio=0))
    for frame in frames:
        frame.pts = None
    pieces = [piece.to_ndarray().reshape(-1) for frame in [*frames, None] for piece in resampler.resample(frame)]
    return np.pad(np.concatenate(pieces), (0, 10 * RATE))


def test_the_stored_vector_is_that_of_the_sound_at_48_khz(config):
    plan = make_plan(config)
    prepare_output(plan, config)
    (ended,) = loop.run(plan.pending, loop.build_stages(plan, config))
    assert ended["error"][0].as_py() is None
    dataset = EmbeddingDataset(config.output.uri)
    shots = dataset.title("a")
    assert len(shots) > 1
    ends = [round(end_s * RATE) for end_s in shots["end_s"].to_pylist()]
    assert ends[-1] == 2.4 * RATE
    sounds = np.split(resampled(plan.pending["video"][0].as_py())[: ends[-1]], ends[:-1])
    expected = ClapEncoder(config.audio).encode([sound.tobytes() for sound in sounds]).embeddings_SD
    np.testing.assert_allclose(dataset.embeddings(shots, "audio"), expected, atol=1e-6)
    levels = shots["audio_levels"].to_pylist()
    assert [len(one) for one in levels] == [-(-len(sound) // (RATE // 10)) for sound in sounds]
    starts = shots["start_s"].to_pylist()
    loud = [start_s + place / 10 for start_s, one in zip(starts, levels, strict=True) for place, level in enumerate(one) if level > -40]
    for click_s in CLICKS:
        assert any(second <= click_s < second + 0.1 for second in loud)
    assert len(loud) <= 2 * len(CLICKS)


def test_the_rate_is_part_of_the_version_where_it_is_not_16_khz(config):
    assert describe_model(config).recipe["media"] == {**recipe_of(config.media), "sample_rate": RATE}
    assert describe_model(EmbedCatalogConfig()).recipe["media"] == recipe_of(config.media)


def test_sound_at_another_rate_than_the_encoders_fails_the_title(config):
    title = {"title_id": "a", "source": "s", "video": "a.mkv", "timed_text": [], "synopsis": "", "tags": [], "superseded": []}
    for rate, reason in ((RATE, None), (16_000, "its sound has 16000 Hz and the audio encoder takes 48000 Hz: audio.weights must be")):
        row = plan_table([title]).append_column("audio", pa.array([[bytes(2000)]], AUDIO))
        error = TitleRow(EncodeAudio(config.audio)(row.append_column("sample_rate", pa.array([rate], pa.int32()))))["error"]
        assert reason in error["message"] if reason else error is None
