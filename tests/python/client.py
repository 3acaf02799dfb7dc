"""Takes a VM through its life with the client that openapi-python-client made of the API's description.

    client.py SOCKET KERNEL    in a folder where the client is the package `halyard_client`
"""

import sys
import time

import httpx
from halyard_client import Client
from halyard_client.api.default import (
    boot_vm,
    create_vm,
    destroy_vm,
    get_device,
    get_job,
    get_vm,
    pause_vm,
    resume_vm,
    shutdown_vm,
)
from halyard_client.models import (
    DeviceConfigRng,
    EndpointFile,
    Kernel,
    Memory,
    OutcomePoweredOff,
    ProblemDocument,
    Shutdown,
    VmConfig,
)

SOCKET, KERNEL = sys.argv[1:]
OUTPUT = "guest.log"
PATIENCE = 30
CLIENT = Client(
    base_url="http://localhost",
    httpx_args={"transport": httpx.HTTPTransport(uds=SOCKET)},
    raise_on_unexpected_status=True,
)


def call(operation, status, **arguments):
    reply = operation.sync_detailed(client=CLIENT, **arguments)
    assert reply.status_code == status, f"{reply.status_code}: {reply.parsed}"
    return reply.parsed


def wait_until(what, there):
    deadline = time.monotonic() + PATIENCE
    while not there():
        assert time.monotonic() < deadline, f"waited {PATIENCE} s for {what}"
        time.sleep(0.01)


def phase():
    return call(get_vm, 200).phase


refused = call(boot_vm, 409)
assert isinstance(refused, ProblemDocument) and "empty" in refused.detail, refused

config = VmConfig(
    kernel=Kernel(path=KERNEL),
    memory=Memory(size="64M"),
    serial=EndpointFile(path=OUTPUT, type_="file"),
    devices=[DeviceConfigRng(type_="rng", id="rng0")],
)
ready = call(create_vm, 201, body=config)
assert ready.phase == "ready" and ready.config.kernel.path == KERNEL, ready
assert isinstance(call(get_device, 200, id="rng0"), DeviceConfigRng)
call(boot_vm, 204)
assert phase() == "running"
wait_until("the guest's first line", lambda: "ready" in open(OUTPUT).read())
call(pause_vm, 204)
assert phase() == "paused"
call(resume_vm, 204)
assert phase() == "running"

job = call(shutdown_vm, 202, body=Shutdown(deadline="30s", force=False))
wait_until("the guest's end", lambda: call(get_job, 200, id=job.id).state != "running")
assert call(get_job, 200, id=job.id).state == "succeeded"
stopped = call(get_vm, 200)
assert stopped.phase == "stopped" and isinstance(stopped.outcome, OutcomePoweredOff), stopped
call(destroy_vm, 204)
assert phase() == "empty"
print("the guest switched itself off")
