"""The example server: a real model, asked over HTTP; and the deployments that bring it."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from pathlib import Path

import yaml

from holdfast.model import Haproxy, ServeJob, load_serve_job
from holdfast.serving.connections import free_port
from tests.chaos.runs import wait_until

REPOSITORY = Path(__file__).parents[2]


def ask(port: int, method: str, path: str, body: str | None = None) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def test_the_example_server_is_healthy_with_its_model_and_embeds_what_it_is_sent() -> None:
    job = load_serve_job(REPOSITORY / "examples/serve.yaml")
    port = free_port()
    arguments = [argument.replace("{port}", str(port)) for argument in job.args]
    server = subprocess.Popen([sys.executable, job.script, *arguments], cwd=job.code)

    def is_well() -> bool:
        assert server.poll() is None
        try:
            return ask(port, "GET", job.health_path)[0] == 200
        except OSError:
            return False

    try:
        wait_until(is_well, 240)
        texts = ["A kitten naps on the sofa.", "The cat is asleep on the couch.", "Taxes are due in April."]
        status, said = ask(port, "POST", "/embed", json.dumps({"texts": texts}))
        kitten, cat, taxes = said["vectors"]
        assert status == 200 and len(kitten) == 384
        near, far = (sum(a * b for a, b in zip(kitten, other, strict=True)) for other in (cat, taxes))
        assert near > 0.5 > far
        for wrong in ("no JSON", '{"texts": "one"}', "[]"):
            status, said = ask(port, "POST", "/embed", wrong)
            assert status == 400 and '"texts"' in said["error"]
        assert ask(port, "POST", "/elsewhere", "{}")[0] == 404
    finally:
        server.terminate()
        server.wait()


def test_the_deployments_of_serving_bring_jobs_that_are_valid() -> None:
    deployments = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())["deployments"]
    jobs = {
        one["name"]: ServeJob.model_validate(one["parameters"]["job"])
        for one in deployments
        if one["entrypoint"] == "flows.serve.serve"
    }
    assert {name: job.load_balancer.kind for name, job in jobs.items()} == {
        "local": "haproxy",
        "aws": "target-group",
        "gcp": "endpoint-groups",
    }
    example = load_serve_job(REPOSITORY / "examples/serve.yaml")
    assert jobs["local"].script == example.script and isinstance(example.load_balancer, Haproxy)
    for name in ("aws", "gcp"):
        assert (REPOSITORY / jobs[name].code / jobs[name].environment.requirements).exists()
