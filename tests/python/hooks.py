"""Keeps a booted guest behind the API, whatever schemathesis has just done to it.

The configuration of the VM is the JSON file that HALYARD_CONFIG names.
"""

import json
import os
import pathlib

import requests
import schemathesis

CONFIG = json.loads(pathlib.Path(os.environ["HALYARD_CONFIG"]).read_text())
# The phase in which an operation does what it is there for, where that is not a running VM.
PHASES = {"create_vm": "empty", "boot_vm": "ready", "resume_vm": "paused"}
SESSION = requests.Session()


def ask(base, verb, path, **body):
    reply = SESSION.request(verb, f"{base}/api/v1/vm{path}", timeout=10, **body)
    reply.raise_for_status()
    return reply


def bring(base, wanted):
    """Brings the VM into a phase, through a new one where it is in none that leads there."""
    phase = ask(base, "GET", "").json()["phase"]
    if phase == wanted:
        return
    if (phase, wanted) == ("running", "paused"):
        ask(base, "POST", "/actions/pause")
        return
    if (phase, wanted) == ("paused", "running"):
        ask(base, "POST", "/actions/resume")
        return
    ask(base, "DELETE", "")
    if wanted == "empty":
        return
    ask(base, "PUT", "", json=CONFIG)
    if wanted != "ready":
        ask(base, "POST", "/actions/boot")
    if wanted == "paused":
        ask(base, "POST", "/actions/pause")


@schemathesis.hook
def before_call(context, case, kwargs):
    operation = case.operation.definition.raw.get("operationId")
    bring(case.operation.base_url, PHASES.get(operation, "running"))
