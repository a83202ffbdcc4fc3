"""Timed text in the formats and encodings of the world, to cues and to the text of shots."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from mediafm_ray.errors import TitleError
from mediafm_ray.media import timed_text
from mediafm_ray.media.isolation import IsolatedReader
from mediafm_ray.media.options import FramesConfig, MediaConfig, TimedTextConfig
from mediafm_ray.spec import Cue, TimedTextSource, Title
from tests.videos import KnownCuts, make_video

SRT = "1\n00:00:01,000 --> 00:00:02,500\nWhere is she?\n\n2\n00:00:03,000 --> 00:00:04,000\nÀ la gare,\nbien sûr.\n"
CUES = [(1.0, 2.5, "Where is she?"), (3.0, 4.0, "À la gare, bien sûr.")]

VTT = """WEBVTT - a title
Kind: captions

STYLE
::cue { color: lime }

NOTE a remark
over two lines

intro
00:01.000 --> 00:02.500 align:start position:10%
<v.loud Esme>Where is <c.red>she</c>?</v>

NOTE between cues

00:00:03.000 --> 00:00:04.000
À la gare, <00:00:03.500>bien s&ucirc;r.
"""

TTML = """<?xml version="1.0" encoding="UTF-8"?>
<tt xmlns="NAMESPACE" xml:lang="fr"><body><div>
<p begin="00:00:01.000" end="00:00:02.500">Where is <span>she</span>?</p>
<p begin="3s" end="4s">À la gare,<br/>bien sûr.</p></div></body></tt>"""

ASS = """[Script Info]
ScriptType: v4.00+

[V4+ Styles]
Format: Name, Fontname, Fontsize
Style: Default,Arial,20

[Events]
Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text
Comment: 0,0:00:00.00,0:00:01.00,Default,,0,0,0,,not shown
Dialogue: 0,0:00:01.00,0:00:02.50,Default,,0,0,0,,{\\i1}Where{\\i0} is she?
Dialogue: 0,0:00:03.00,0:00:04.00,Default,,0,0,0,,À la gare,\\Nbien sûr.
"""


def cues_of(data: bytes, name: str, **config) -> tuple[list[tuple[float, float, str]], list[str]]:
    cues, warnings = timed_text.parse(data, name, TimedTextConfig(**config))
    return [(cue.start_s, cue.end_s, cue.text) for cue in cues], warnings


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (SRT, "a.srt"),
        (SRT.replace("\n", "\r\n"), "a.srt"),
        (SRT.replace(",000", "").replace(",500", ",5"), "a.srt"),  # times without milliseconds
        (SRT.replace("\n\n2\n", "\n2\n"), "a.srt"),  # no blank line between cues
        (VTT, "a.vtt"),
        (VTT.replace("WEBVTT - a title\nKind: captions\n\n", ""), "a.vtt"),  # no header
        (TTML.replace("NAMESPACE", "http://www.w3.org/ns/ttml"), "a.ttml"),
        (TTML.replace("NAMESPACE", "http://www.w3.org/2006/10/ttaf1"), "a.dfxp"),
        (ASS, "a.ass"),
    ],
)
def test_formats(text, name):
    assert cues_of(text.encode(), name) == (CUES, [])


@pytest.mark.parametrize(
    ("data", "remark"),
    [
        (SRT.encode("utf-8-sig"), None),
        (SRT.encode("utf-16"), None),
        (b"\xfe\xff" + SRT.encode("utf-16-be"), None),
        (SRT.encode("utf-16-le"), "UTF-16"),
        (SRT.encode("utf-16-be"), "UTF-16"),
        (SRT.encode("cp1252"), "Windows-1252"),
    ],
)
def test_encodings(data, remark):
    cues, warnings = cues_of(data, "a.srt")
    assert cues == CUES
    assert [remark in warning for warning in warnings] == ([True] if remark else [])


def test_scc():
    """Pop-on captions: loaded, shown by 942f, erased by 942c; times are drop-less frames at 29.97 a second."""
    scc = "Scenarist_SCC V1.0\n\n00:00:01:00\t9420 9420 94ae 94ae 9470 9470 c8e5 ecec ef80 942c 942c 942f 942f\n\n00:00:03:00\t942c 942c\n"
    ((start_s, end_s, text),), warnings = cues_of(scc.encode(), "a.scc")
    assert text == "Hello"
    assert start_s == pytest.approx(1.0 + 11 / 29.97, abs=0.1)
    assert end_s == pytest.approx(3.003, abs=0.04)
    assert warnings == []


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("", 0),
        ("1\n00:00:03,000 --> 00:00:02,000\nbackwards\n", 0),
        (SRT + "\n3\n00:00:05,0", 2),  # cut off
        ("no cue at all --> here", 0),
    ],
)
def test_odd_files_are_warned_of_or_cut_to_what_is_whole(text, kept):
    cues, warnings = cues_of(text.encode(), "a.srt")
    assert len(cues) == kept
    assert cues == CUES[:kept]
    assert bool(warnings) == (kept == 0)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8, "a.srt"),
        (b"just words", "a.vtt"),
        (b'<?xml version="1.0"?><!DOCTYPE tt [<!ENTITY a "aa">]><tt xmlns="http://www.w3.org/ns/ttml">&a;</tt>', "a.ttml"),
        (b"<tt xmlns='http://www.w3.org/ns/ttml'><body>", "a.ttml"),
        (b"<tt xmlns='http://example.org'/>", "a.ttml"),
    ],
)
def test_what_is_no_timed_text_is_refused_by_name(data, name):
    with pytest.raises(TitleError, match=f"timed text {name} cannot be read"):
        timed_text.parse(data, name, TimedTextConfig())


@pytest.mark.parametrize(
    ("marked", "config", "plain"),
    [
        ("<i>Italic</i> <font color='#ff0000'>red</font> {\\an8}top", {}, "Italic red top"),
        ("- One.\n- Two.", {}, "One. Two."),
        (">> JOHN: Hello", {}, "Hello"),
        (">> JOHN: Hello", {"speakers": True}, "John: Hello"),
        ("<v Roger Bingham>Hello", {"speakers": True}, "Roger Bingham: Hello"),
        ("he's in - in a bad humor", {}, "he's in - in a bad humor"),
        ("[DOOR SLAMS] ♪ la la ♪ (sighs) Well", {}, "[DOOR SLAMS] ♪ la la ♪ (sighs) Well"),
        ("[DOOR SLAMS] ♪ la la ♪ (sighs) Well", {"sound_cues": False}, "Well"),
        ("a &lt;b&gt; &amp; c", {}, "a <b> & c"),
        ("1 < 2 and 3 > 2", {}, "1 < 2 and 3 > 2"),
    ],
)
def test_markup_by_the_documented_rules(marked, config, plain):
    assert timed_text.plain(marked, TimedTextConfig(**config)) == plain


def test_cue_that_spans_a_cut():
    shots = [(0.0, 2.0), (2.0, 2.1), (2.1, 10.0)]
    cues = [
        Cue(0.5, 1.0, "one"),
        Cue(1.9, 4.0, "mostly the third"),
        Cue(1.0, 3.0, "both"),
        Cue(9.0, 20.0, "last"),
        Cue(11.0, 12.0, "after"),
    ]
    texts = timed_text.text_of_shots(sorted(cues, key=lambda cue: cue.start_s), shots)
    assert [text for text, _ in texts] == ["one both", "", "both mostly the third last"]


def test_every_cue_that_is_shown_reaches_a_shot():
    """However short the shots, and however the cues lie."""
    shots = [(index / 10, (index + 1) / 10) for index in range(100)]
    cues = [Cue(start / 7, start / 7 + 0.35, f"cue {start}") for start in range(60)]
    words = " ".join(text for text, _ in timed_text.text_of_shots(cues, shots))
    assert all(cue.text in words for cue in cues)


def test_repeated_captions_count_once():
    cues = [Cue(0.0, 1.0, "rolling"), Cue(1.0, 2.0, "rolling"), Cue(2.0, 3.0, "on")]
    assert timed_text.text_of_shots(cues, [(0.0, 5.0)]) == [("rolling on", "")]


def test_choice_by_language_and_kind():
    sources = [
        TimedTextSource("fr.srt", "fr-CA"),
        TimedTextSource("forced.srt", "eng", "forced"),
        TimedTextSource("en.srt", "en-GB", "subtitles"),
        TimedTextSource("cc.srt", "eng", "captions"),
        TimedTextSource("unknown.srt"),
    ]

    def best(**config) -> list[str]:
        return [source.uri for source in timed_text.by_fit(sources, TimedTextConfig(**config))]

    assert best(languages=["en", "fr"]) == ["cc.srt", "en.srt", "fr.srt", "unknown.srt"]
    assert best(languages=["de"]) == ["unknown.srt"]
    assert best(kinds=["forced"]) == ["forced.srt"]
    assert best(kinds=["descriptions"]) == []


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "mov_text"), ("a.mkv", "subrip")])
def test_subtitle_streams_are_used_where_there_is_no_sidecar(tmp_path: Path, read, name, codec):
    made = make_video(tmp_path / name, [25, 50], cues=[(0.2, 0.8, "Where is she?"), (1.5, 2.5, "<i>Here.</i>")], cue_codec=codec)
    media = read(made.path, made.cuts)
    assert [(shot.text, shot.language) for shot in media.shots] == [("Where is she?", "en"), ("Here.", "en")]
    sidecar = tmp_path / "other.srt"
    sidecar.write_text("1\n00:00:00,100 --> 00:00:00,900\nFrom the sidecar\n")
    media = read(made.path, made.cuts, [TimedTextSource(str(sidecar), "de")])
    assert [(shot.text, shot.language) for shot in media.shots] == [("From the sidecar", "de"), ("", "")]


def test_sidecar_counts_from_the_first_picture(tmp_path, read):
    from fractions import Fraction

    made = make_video(tmp_path / "a.ts", [25, 50], start=Fraction(100), time_base=Fraction(1, 90_000))
    sidecar = tmp_path / "a.srt"
    sidecar.write_text("1\n00:00:01,100 --> 00:00:02,000\nsecond shot\n")
    assert [shot.text for shot in read(made.path, made.cuts, [TimedTextSource(str(sidecar))]).shots] == ["", "second shot"]


def test_unreadable_sidecar_is_a_warning_and_the_next_is_taken(tmp_path, read):
    made = make_video(tmp_path / "a.mp4", [25])
    (tmp_path / "bad.srt").write_bytes(b"\x89PNG" + bytes(range(256)))
    (tmp_path / "good.srt").write_bytes("1\n00:00:00,100 --> 00:00:00,900\nOù ?\n".encode("latin-1"))
    sources = [TimedTextSource(str(tmp_path / one)) for one in ("missing.srt", "bad.srt", "good.srt")]
    media = read(made.path, sidecars=sources)
    assert media.shots[0].text == "Où ?"
    assert len(media.warnings) == 3
    assert ["missing.srt" in media.warnings[0], "bad.srt" in media.warnings[1], "good.srt" in media.warnings[2]] == [True] * 3
    assert not any(str(tmp_path) in warning for warning in media.warnings)


def test_embedded_text_can_be_switched_off(tmp_path):
    made = make_video(tmp_path / "a.mp4", [25], cues=[(0.2, 0.8, "Where is she?")])
    reader = IsolatedReader(FramesConfig(), TimedTextConfig(embedded=False), MediaConfig())
    try:
        assert reader.read(Title("a", str(made.path)), KnownCuts([])).shots[0].text == ""
    finally:
        reader.close()


# --------------------------------------------------------------------------------- hostile text is a warning, and no more

DEEP_TTML = '<tt xmlns="http://www.w3.org/ns/ttml"><body>' + "<div>" * 50_000 + "</div>" * 50_000 + "</body></tt>"
JSON_EVENTS = r'{"info": {}, "styles": {}, "events": [{"start": 0, "end": 900, "text": "half \ud800 a character"}]}'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("hours.srt", f"1\n{'9' * 400}:00:01,000 --> {'9' * 400}:00:02,000\nmuch later\n"),
        ("digits.srt", f"1\n{'9' * 9000}:00:01,000 --> {'9' * 9000}:00:02,000\nmuch later\n"),
        (
            "rate.ttml",
            '<tt xmlns="http://www.w3.org/ns/ttml" xmlns:ttp="http://www.w3.org/ns/ttml#parameter" ttp:frameRate="0">'
            '<body><div><p begin="00:00:00:00" end="00:00:00:20">a</p></div></body></tt>',
        ),
        ("deep.ttml", DEEP_TTML),
        ("nested.json", "[" * 100_000),
        ("surrogate.json", JSON_EVENTS),
        ("cues.srt", "0:1-->0:2\n" * (timed_text.MAX_CUES + 1)),
    ],
    ids=lambda value: value if len(value) < 20 else "",
)
def test_hostile_text_is_a_warning_and_the_next_is_taken(tmp_path, read, name, content):
    made = make_video(tmp_path / "a.mp4", [25], size=(96, 64))
    (tmp_path / name).write_text(content)
    (tmp_path / "good.srt").write_text("1\n00:00:00,100 --> 00:00:00,900\nWhere is she?\n")
    media = read(made.path, sidecars=[TimedTextSource(str(tmp_path / name)), TimedTextSource(str(tmp_path / "good.srt"))])
    assert media.shots[0].text == "Where is she?"
    (warning,) = media.warnings
    assert f"timed text {name}" in warning
    assert len(warning) < 700


def test_title_of_which_no_text_can_be_read_has_the_embedded_one(tmp_path, read):
    made = make_video(tmp_path / "a.mp4", [25], cues=[(0.2, 0.8, "Where is she?")])
    (tmp_path / "deep.ttml").write_text(f"{'9' * 400}:00:01,000 --> {'9' * 400}:00:02,000\nmuch later\n")
    media = read(made.path, sidecars=[TimedTextSource(str(tmp_path / "deep.ttml"))])
    assert media.shots[0].text == "Where is she?"
    assert len(media.warnings) == 1


def test_reference_to_no_character_is_one_character():
    assert timed_text.plain(f"a &#{'1' * 10_000}; b &#xd800; c", TimedTextConfig()) == "a \ufffd b \ufffd c"


def test_speaker_marks_take_no_quadratic_time():
    config = TimedTextConfig(speakers=True)
    started = time.process_time()
    assert timed_text.plain("<v" + " " * 200_000, config) == "<v"
    assert time.process_time() - started < 1
    assert timed_text.plain("<v.loud   Roger Bingham >Hello", config) == "Roger Bingham: Hello"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("0:1-->0:2\n" * 90_000, "a.srt"),  # cues without blank lines between them
        ("0:1-->0:2\na\n\n" + "a\n\n" * 300_000, "a.srt"),  # one cue with very many blank lines inside
    ],
)
def test_subrip_takes_no_quadratic_time(text, name):
    started = time.process_time()
    timed_text.parse(text.encode(), name, TimedTextConfig())
    assert time.process_time() - started < 10


def test_too_much_text_is_left_out_with_a_warning():
    """A cue of a million characters over all shots, and cues over cues."""
    shots = [(float(index), index + 1.0) for index in range(3000)]
    cues = [Cue(0.0, 3000.0, "x" * 1_000_000), *[Cue(0.0, 3000.0, f"cue {number}") for number in range(5000)], Cue(5.0, 5.9, "after")]
    warnings: list[str] = []
    started = time.process_time()
    texts = timed_text.text_of_shots(cues, shots, warnings)
    assert time.process_time() - started < 20
    assert sum(len(text) for text, _ in texts) <= timed_text.MAX_TITLE_CHARACTERS
    assert max(len(text) for text, _ in texts) <= timed_text.MAX_SHOT_CHARACTERS
    assert ["too much timed text" in warning for warning in warnings] == [True]


# ----------------------------------------------------------------------------------------------------------------- TTML


def ttml_document(body: str, head: str = "", parameters: str = "") -> bytes:
    namespaces = 'xmlns="http://www.w3.org/ns/ttml" xmlns:tts="http://www.w3.org/ns/ttml#styling" '
    namespaces += 'xmlns:ttp="http://www.w3.org/ns/ttml#parameter" xmlns:ttm="http://www.w3.org/ns/ttml#metadata"'
    return f'<?xml version="1.0"?><tt {namespaces} {parameters}><head>{head}</head>{body}</tt>'.encode()


def test_ttml_takes_no_quadratic_time_and_gives_signs_of_life():
    cues = "".join(f'<p begin="{i}s" end="{i}.9s">Line <span>{i}</span><br/>of text</p>' for i in range(20_000))
    signs = 0

    def alive() -> None:
        nonlocal signs
        signs += 1

    started = time.process_time()
    cues, warnings = timed_text.parse(ttml_document(f"<body><div>{cues}</div></body>"), "a.ttml", TimedTextConfig(), alive=alive)
    assert time.process_time() - started < 10
    assert (len(cues), warnings) == (20_000, [])
    assert cues[-1] == Cue(19_999.0, 19_999.9, "Line 19999 of text")
    assert signs > 1000


def test_parent_hears_of_a_text_that_takes_long(tmp_path):
    """Parsing longer than the limit of no progress is progress."""
    made = make_video(tmp_path / "a.mp4", [25], size=(96, 64))
    cues = "".join(f'<p begin="{i}s" end="{i}.9s">Line <span>{i}</span><br/>of text</p>' for i in range(90_000))
    (tmp_path / "a.ttml").write_bytes(ttml_document(f"<body><div>{cues}</div></body>"))
    reader = IsolatedReader(FramesConfig(per_shot=1), TimedTextConfig(), MediaConfig(no_progress_timeout_s=4.0))
    try:
        media = reader.read(Title("a", str(made.path), (TimedTextSource(str(tmp_path / "a.ttml")),)), KnownCuts([]))
    finally:
        reader.close()
    assert media.shots[0].text == "Line 0 of text"


@pytest.mark.parametrize(
    ("body", "head", "parameters", "cues"),
    [
        # frames, ticks, units
        ('<body><div><p begin="00:00:01:12" end="00:00:02">a</p></div></body>', "", 'ttp:frameRate="24"', [(1.5, 2.0, "a")]),
        ('<body><div><p begin="48f" dur="500ms">a</p></div></body>', "", 'ttp:frameRate="24"', [(2.0, 2.5, "a")]),
        ('<body><div><p begin="10000t" end="0.5m">a</p></div></body>', "", 'ttp:tickRate="10000"', [(1.0, 30.0, "a")]),
        # SMPTE time codes of NTSC without and with dropped numbers: an hour of code is 3603.6 s and an hour
        (
            '<body><div><p begin="01:00:00:00" end="01:00:01:00">a</p></div></body>',
            "",
            'ttp:frameRate="30" ttp:frameRateMultiplier="1000 1001" ttp:timeBase="smpte"',
            [(3603.6, 3604.601, "a")],
        ),
        (
            '<body><div><p begin="01:00:00:00" end="01:00:01:00">a</p></div></body>',
            "",
            'ttp:frameRate="30" ttp:frameRateMultiplier="1000 1001" ttp:timeBase="smpte" ttp:dropMode="dropNTSC"',
            [(3599.9964, 3600.9974, "a")],
        ),
        # times within times, and one after the other
        ('<body begin="10s"><div begin="1s" end="5s"><p begin="1s" end="30s">a</p></div></body>', "", "", [(12.0, 15.0, "a")]),
        (
            '<body><div timeContainer="seq"><p dur="1s">a</p><p begin="1s" dur="2s">b</p></div></body>',
            "",
            "",
            [(0.0, 1.0, "a"), (2.0, 4.0, "b")],
        ),
        # what is on screen together, in the order of the document; a neighbour that changes nothing
        (
            '<body><div><p begin="2s" end="3s">b</p><p begin="1s" end="4s">c</p></div></body>',
            "",
            "",
            [(1.0, 2.0, "c"), (2.0, 3.0, "b c"), (3.0, 4.0, "c")],
        ),
        ('<body><div><p begin="1s" end="2s">a</p><p begin="2s" end="3s">a</p></div></body>', "", "", [(1.0, 3.0, "a")]),
        (
            '<body><div><p>a<span begin="1s" end="2s"> b</span></p></div></body>',
            "",
            "",
            [(0.0, 1.0, "a"), (1.0, 2.0, "a b"), (2.0, 12.0, "a")],
        ),
        # regions in their order and time, hidden ones, text outside of all
        (
            '<body><div><p region="low" begin="1s" end="9s">b</p><p region="top" begin="1s" end="9s">a</p><p>c</p>'
            '<p region="off" begin="1s">d</p></div></body>',
            '<layout><region xml:id="top" end="5s"/><region xml:id="low"/>'
            '<region xml:id="off"><style tts:display="none"/></region></layout>',
            "",
            [(1.0, 5.0, "a b"), (5.0, 9.0, "b")],
        ),
        # hidden by attribute and style; metadata and other namespaces are no text
        (
            '<body><div><p begin="1s" end="2s">a<span tts:display="none">b</span><span style="s">c</span><metadata>d</metadata>'
            '<ttm:desc>e</ttm:desc><x xmlns="http://example.org">f</x></p></div></body>',
            '<styling><style xml:id="s" tts:display="none"/></styling>',
            "",
            [(1.0, 2.0, "a")],
        ),
        # a time that is none
        ('<body><div><p begin="soon" end="2s">a</p><p begin="1s" end="2s">b</p></div></body>', "", "", [(1.0, 2.0, "b")]),
    ],
)
def test_ttml_by_the_standard(body, head, parameters, cues):
    found, _ = cues_of(ttml_document(body, head, parameters), "a.ttml")
    assert [text for _, _, text in found] == [text for _, _, text in cues]
    assert [times[:2] for times in found] == [pytest.approx(times[:2], abs=1e-5) for times in cues]
