"""Text that a catalog, a caption or a file's metadata may hold, and that a careless page would take for markup, script or order."""

HOSTILE = [
    "</script><script>window.taken = 1</script>",
    "<img src=x onerror='window.taken = 1'>",
    '"><svg onload=window.taken=1>',
    "' onmouseover='window.taken=1' x='",
    "</title></style><style>*{display:none}</style>",
    "<!--<script>",
    "{{ 7 * 7 }}{% raw %}",
    "javascript:window.taken=1",
    "&lt;script&gt;window.taken=1&lt;/script&gt;&#60;",
    "\u202egnirts desrever\u202c \u2066isolate \u200f\u2028\u2029",
    "tab\tnull-like\x01escape\x1b[31m line\nbreak",
    "x" * 5000,
    "\U0001f600 e\u0301 \u05e2\u05d1\u05e8\u05d9\u05ea \u5f71\u7247",
]
