"""An OpenStack Swift node with its S3 API on loopback: account, container, object and proxy server in one process, one disk, one replica.

Run by the interpreter of the servers' environment: swift_node.py FOLDER PORT (and the three ports above it). Everything it keeps is below
FOLDER. It prints "ready" when it answers. CLOCK_SKEW_S in the environment: how old a request's signature may be.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

import eventlet
import swift.common.utils as utils
from swift.common.ring import RingBuilder

PR_SET_PDEATHSIG = 1  # linux/prctl.h
BACKENDS = ("account", "container", "object")  # on the ports above the proxy's
CLOCK_SKEW_S = os.environ.get("CLOCK_SKEW_S", "900")

SWIFT = """
[swift-hash]
swift_hash_path_prefix = tests
swift_hash_path_suffix = tests
[storage-policy:0]
name = only
default = yes
"""
# update timeout: a PUT waits until the listing has it, as S3 promises
BACKEND = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {folder}
devices = {folder}/disks
mount_check = false
disable_fallocate = true
fallocate_reserve = 0
container_update_timeout = 30
[pipeline:main]
pipeline = {name}-server
[app:{name}-server]
use = egg:swift#{name}
"""
PROXY = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {folder}
[pipeline:main]
pipeline = catch_errors gatekeeper listing_formats bulk s3api tempauth copy slo dlo versioned_writes proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
allow_account_management = true
node_timeout = 60
conn_timeout = 5
error_suppression_limit = 1000000
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
dns_compliant_bucket_names = true
allowable_clock_skew = {clock_skew}
"""
FILTERS = ("catch_errors", "gatekeeper", "listing_formats", "bulk", "copy", "slo", "dlo", "versioned_writes")


def write_configuration(folder: Path, port: int) -> None:
    """The files that Swift is configured by, and the rings that say where data lies."""
    (folder / "disks" / "one").mkdir(parents=True, exist_ok=True)
    (folder / "swift.conf").write_text(SWIFT)
    utils.set_swift_dir(str(folder))
    filters = "".join(f"[filter:{name}]\nuse = egg:swift#{name}\n" for name in FILTERS)
    proxy = PROXY.format(port=port, folder=folder, clock_skew=CLOCK_SKEW_S) + filters
    (folder / "proxy-server.conf").write_text(proxy)
    for offset, name in enumerate(BACKENDS, start=1):
        (folder / f"{name}-server.conf").write_text(BACKEND.format(name=name, port=port + offset, folder=folder))
        place = {"ip": "127.0.0.1", "port": port + offset, "replication_ip": "127.0.0.1", "replication_port": port + offset}
        ring = RingBuilder(4, 1, 1)
        ring.add_dev({"id": 0, "region": 1, "zone": 1, "device": "one", "weight": 1.0, "meta": "", **place})
        ring.rebalance()
        ring.get_ring().save(str(folder / f"{name}.ring.gz"))


def serve(folder: Path, port: int) -> None:
    """All four servers, until the process ends."""
    from eventlet import wsgi
    from swift.common.http_protocol import SwiftHttpProtocol
    from swift.common.wsgi import loadapp

    eventlet.hubs.use_hub("poll")
    servers = []
    for offset, name in enumerate(("proxy", *BACKENDS)):
        listener = eventlet.listen(("127.0.0.1", port + offset), backlog=512)
        app = loadapp(str(folder / f"{name}-server.conf"), global_conf={"log_name": name})
        # S3 clients want the header as it is written: ETag
        options = {"protocol": SwiftHttpProtocol, "capitalize_response_headers": False, "log_output": False}
        servers.append(eventlet.spawn(wsgi.server, listener, app, **options))
    print("ready", flush=True)
    for server in servers:
        server.wait()


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # it ends with the tests that started it
    node = Path(sys.argv[1])
    utils.eventlet_monkey_patch()
    write_configuration(node, int(sys.argv[2]))
    serve(node, int(sys.argv[2]))
