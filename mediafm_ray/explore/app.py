"""The web application (ASGI) over an embedded catalog: pages, thumbnails, videos by ranges, exports. No ray here.

Title ids are only looked up and never become a part of a path; they are in the query of an address, because browsers resolve '..' in
its path. Pages are rendered here with everything escaped; the scripts are files of this package.
"""

from __future__ import annotations

import functools
import hashlib
import io
import logging
import urllib.parse
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mediafm_ray.config.loader import ConfigError
from mediafm_ray.derive.pages import title_content
from mediafm_ray.derive.repeats import repeats_of
from mediafm_ray.downstream.pages import ASSETS as TITLE_ASSETS
from mediafm_ray.downstream.pages import clock, json_for_html, title_values, visible
from mediafm_ray.errors import OutageError, TitleError
from mediafm_ray.explore.access import Guard
from mediafm_ray.explore.cache import BoundedCache
from mediafm_ray.explore.catalog import SPACES, Catalog
from mediafm_ray.explore.export import FORMATS, export, parse_places
from mediafm_ray.explore.queries import COUNTS, Found, Search, find, find_by_each, link, shot_number
from mediafm_ray.explore.video import OpenVideo, RangeError, content_type, open_video, parse_range, playable_type
from mediafm_ray.storage.dataset import DatasetError
from mediafm_ray.storage.store import fsspec_options
from mediafm_ray.text import public_line

log = logging.getLogger(__name__)

ASSETS = Path(__file__).parent / "page"
STATIC = {  # name -> file and its media type
    "page.css": (TITLE_ASSETS / "page.css", "text/css"),
    "explore.css": (ASSETS / "explore.css", "text/css"),
    "common.js": (TITLE_ASSETS / "common.js", "text/javascript"),
    "title.js": (TITLE_ASSETS / "title.js", "text/javascript"),
    "player.js": (ASSETS / "player.js", "text/javascript"),
    "explore.js": (ASSETS / "explore.js", "text/javascript"),
}
NO_PICTURE = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 160 90"><rect width="160" height="90" fill="#8883"/>'
    '<text x="80" y="49" font-family="sans-serif" font-size="11" text-anchor="middle" fill="#888">no picture stored</text></svg>'
)
CHUNK_BYTES = 256 << 10  # bytes of a video that are read and sent at once
MAX_PICTURE_BYTES = 16 << 20  # an uploaded picture
MAX_PICTURE_PIXELS = 50_000_000
PICTURE_SIDE = 512  # pixels of the longer side of an uploaded picture, as the encoder gets it
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP")
MAX_FORM_BYTES = 2 << 20
MAX_PAGE_BYTES = 64 << 20  # pages of titles in memory
TITLES_A_PAGE = 100
MAX_REPEATS = 200  # repeats on the page of a title, the longest
MAX_OFFERED = 500  # titles that a field of the form offers


def make_app(catalog: Catalog, host: str = "127.0.0.1", hosts: tuple[str, ...] = (), token: str = "") -> Guard:
    """Return the application, guarded: see ``access.Guard`` for ``host``, ``hosts`` and ``token``."""
    pages = Pages(catalog)
    routes = [
        Route("/", pages.start),
        Route("/compare", pages.compare),
        Route("/titles", pages.titles),
        Route("/title", pages.title),
        Route("/media", pages.media, methods=["GET", "HEAD"]),
        Route("/thumbnail", pages.thumbnail),
        Route("/picture", pages.picture, methods=["POST"]),
        Route("/export", pages.export, methods=["POST"]),
        Route("/static/{name}", static),
    ]
    handlers: dict[Any, Any] = dict.fromkeys((ConfigError, DatasetError, TitleError, OutageError, HTTPException, Exception), pages.explain)
    return Guard(Starlette(routes=routes, exception_handlers=handlers), host, hosts, token)


class Pages:
    """The pages of a catalog. The functions that are no coroutines run in threads."""

    def __init__(self, catalog: Catalog):
        self.catalog = catalog
        self.title_pages = BoundedCache(MAX_PAGE_BYTES, len)
        self.environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader([ASSETS, TITLE_ASSETS]),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self.environment.filters |= {"visible": visible, "clock": clock}
        self.environment.globals |= {"link": link, "catalog": catalog, "spaces": SPACES, "counts": COUNTS}
        self.environment.globals["offered"] = list(catalog.objects)[:MAX_OFFERED]

    def _render(self, name: str, **values: Any) -> str:
        return self.environment.get_template(name).render(**values)

    # -------------------------------------------------------------------------------------------------------------- pages

    def start(self, request: Request) -> Response:
        """Answer with the search form and, where something is asked for, the results."""
        problem, found, status = "", None, 200
        search = Search()
        try:
            search = Search.of(request.query_params)
            if search.kind and self.catalog.index is not None:
                found = find(self.catalog, search)
        except (ConfigError, DatasetError) as error:
            problem, status = str(error), 400
        return HTMLResponse(self._render("search.html", search=search, found=found, problem=problem, scripts=["explore.js"]), status)

    def compare(self, request: Request) -> Response:
        """Answer with the nearest shots of a shot by each kind of vectors, side by side."""
        search = Search.of(request.query_params)
        if search.kind != "shot":
            raise ConfigError("choose a shot to compare by: like=TITLE and shot=INDEX")
        row = self._shot(search.like, search.shot)
        columns: dict[str, Found | str] = find_by_each(self.catalog, search)
        return HTMLResponse(self._render("compare.html", search=search, shot=row, columns=columns, scripts=["explore.js"]))

    def titles(self, request: Request) -> Response:
        """Answer with a page of the list of titles."""
        part, page = request.query_params.get("part", ""), request.query_params.get("page", "1")
        fitting = [title_id for title_id in self.catalog.objects if part.lower() in title_id.lower()]
        pages = max(-(-len(fitting) // TITLES_A_PAGE), 1)
        number = min(max(int(page), 1), pages) if page.isascii() and page.isdigit() and len(page) < 10 else 1
        shown = fitting[(number - 1) * TITLES_A_PAGE : number * TITLES_A_PAGE]
        values = {"part": part, "page": number, "pages": pages, "shown": shown, "count": len(fitting)}
        return HTMLResponse(self._render("titles.html", scripts=["explore.js"], **values))

    def title(self, request: Request) -> Response:
        """Answer with the page of a title: its player and what the pages of ``mediafm page`` show."""
        title_id = request.query_params.get("id", "")
        title = self.catalog.title(title_id)
        absent, replaced = "", False
        mime, unplayable = playable_type(title.source)
        try:
            with self._open(title.facts).stream as stream:
                replaced = stream.seek(0, io.SEEK_END) != title.source.get("bytes", stream.tell())
        except (TitleError, OutageError) as error:
            absent = str(error)
        key = (title_id, absent, replaced)
        name = functools.partial(self._title_page, title_id, absent, replaced, mime, unplayable)
        return HTMLResponse(self.title_pages.get(key, name))

    def _title_page(self, title_id: str, absent: str, replaced: bool, mime: str, unplayable: str) -> str:
        try:
            values = title_values(title_content(self.catalog.dataset, title_id, index="/titles"))
        except ValueError as error:
            raise DatasetError(f"{title_id!r} cannot be shown: {error}") from error
        data = {**values.pop("data"), "id": title_id}
        player = {"absent": absent, "replaced": replaced, "mime": mime, "unplayable": unplayable}
        table = self.catalog.repeats
        shared = [] if table is None else repeats_of(table, title_id, MAX_REPEATS)
        scripts = ["common.js", "title.js", "explore.js", "player.js"]
        values |= {"data": Markup(json_for_html(data)), "player": player, "repeats": shared, "scripts": scripts}
        return self._render("player.html", id=title_id, most_repeats=MAX_REPEATS, **values)

    def _shot(self, title_id: str, shot: str) -> dict[str, Any]:
        title, number = self.catalog.title(title_id), shot_number(shot)
        title.check(number)
        return {**title.shots.slice(number, 1).to_pylist()[0], "title_id": title_id}

    # ----------------------------------------------------------------------------------------------------------- pictures

    def thumbnail(self, request: Request) -> Response:
        """Answer with the stored picture of a shot, or with a drawing where none is stored."""
        jpeg = self.catalog.thumbnail(request.query_params.get("id", ""), shot_number(request.query_params.get("shot", "")))
        kept = {"cache-control": "private, max-age=3600"}
        return Response(jpeg, media_type="image/jpeg", headers=kept) if jpeg else Response(NO_PICTURE, media_type="image/svg+xml")

    async def picture(self, request: Request) -> Response:
        """Compute the vector of a picture in the body; answer with the name under which it can be searched with."""
        content = await _body(request, MAX_PICTURE_BYTES)
        return JSONResponse({"picture": await run_in_threadpool(self._add_picture, content)})

    def _add_picture(self, content: bytes) -> str:
        if self.catalog.no_pictures:
            raise ConfigError(self.catalog.no_pictures)
        name = hashlib.sha256(content).hexdigest()[:32]
        self.catalog.add_picture(name, as_jpeg(content))
        return name

    # -------------------------------------------------------------------------------------------------------------- video

    def media(self, request: Request) -> Response:
        """Answer with a title's video or a part of it, read from wherever it lies."""
        title = self.catalog.title(request.query_params.get("id", ""))
        video = self._open(title.facts)
        headers = {"accept-ranges": "bytes", "etag": f'"{video.tag}"', "cache-control": "no-cache"}
        wanted = request.headers.get("range", "") if request.headers.get("if-range", headers["etag"]) == headers["etag"] else ""
        try:
            part = parse_range(wanted, video.size)
        except RangeError:
            video.stream.close()
            return PlainTextResponse("", 416, {**headers, "content-range": f"bytes */{video.size}"})
        start, end = part or (0, video.size)
        headers["content-length"] = str(end - start)
        if part:
            headers["content-range"] = f"bytes {start}-{end - 1}/{video.size}"
        type_ = content_type(title.source)
        if request.method == "HEAD":
            video.stream.close()
            return Response(status_code=206 if part else 200, headers=headers, media_type=type_)
        return VideoResponse(video, start, end, status_code=206 if part else 200, headers=headers, media_type=type_)

    def _open(self, facts: Any) -> OpenVideo:
        uri, config = facts.get("video", ""), self.catalog.config
        return open_video(uri, {**fsspec_options(uri, config.storage), **config.explore.storage_options})

    # ------------------------------------------------------------------------------------------------------------- export

    async def export(self, request: Request) -> Response:
        """Answer with a file of the selected shots."""
        body = (await _body(request, MAX_FORM_BYTES)).decode("utf-8", "replace")
        fields = dict(urllib.parse.parse_qsl(body))
        kind = fields.get("format", "")
        text = await run_in_threadpool(lambda: export(self.catalog, kind, parse_places(fields.get("places", ""))))
        disposition = {"content-disposition": f'attachment; filename="selection.{kind}"'}
        return Response(text.encode(), media_type=FORMATS[kind], headers=disposition)

    # ------------------------------------------------------------------------------------------------------------- errors

    def explain(self, request: Request, error: Exception) -> Response:
        """Answer with a page that says what is wrong."""
        if isinstance(error, HTTPException):
            status, text = error.status_code, error.detail
        elif isinstance(error, OutageError):
            status, text = 503, str(error)
        elif isinstance(error, (DatasetError, TitleError)):
            status, text = 404, str(error)
        elif isinstance(error, ConfigError):
            status, text = 400, str(error)
        else:
            log.error("unexpected error at %s", public_line(request.url.path), exc_info=error)
            status, text = 500, "an unexpected error; its traceback is in the terminal of mediafm explore"
        if request.url.path in ("/media", "/thumbnail", "/picture"):
            return PlainTextResponse(text, status)
        return HTMLResponse(self._render("problem.html", text=text, status=status, scripts=["explore.js"]), status)


class VideoResponse(StreamingResponse):
    """A part of a video, which is closed once it was sent or the browser has gone."""

    def __init__(self, video: OpenVideo, start: int, end: int, **options: Any):
        super().__init__(self._chunks(video, start, end), **options)
        self.video = video

    async def _chunks(self, video: OpenVideo, start: int, end: int) -> AsyncIterator[bytes]:
        await run_in_threadpool(video.stream.seek, start)
        while start < end:
            chunk = await run_in_threadpool(video.stream.read, min(CHUNK_BYTES, end - start))
            if not chunk:  # It was truncated meanwhile.
                raise OutageError("the video became shorter while it was read")
            start += len(chunk)
            yield chunk

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.video.stream.close()


def static(request: Request) -> Response:
    """Answer with one of the files of this package that are listed."""
    found = STATIC.get(request.path_params["name"])
    if found is None:
        raise HTTPException(404, "there is no such file")
    return Response(_file(found[0]), media_type=found[1], headers={"cache-control": "no-cache"})


@functools.cache
def _file(path: Path) -> bytes:
    return path.read_bytes()


async def _body(request: Request, most: int) -> bytes:
    """Read the body of a request of at most so many bytes."""
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        if size > most:
            raise HTTPException(413, f"at most {most >> 20} MB can be sent")
        pieces.append(piece)
    return b"".join(pieces)


def as_jpeg(content: bytes) -> bytes:
    """Convert an uploaded picture to a JPEG file of bounded size. Raises ConfigError for what is no picture."""
    try:
        picture: Image.Image = Image.open(io.BytesIO(content), formats=PICTURE_FORMATS)
        if picture.width * picture.height > MAX_PICTURE_PIXELS:
            raise ConfigError(f"the picture has more than {MAX_PICTURE_PIXELS // 1_000_000} million pixels")
        picture = picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(f"this is no picture that can be read ({', '.join(PICTURE_FORMATS)} are)") from error
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    sink = io.BytesIO()
    picture.save(sink, "JPEG", quality=95)
    return sink.getvalue()
