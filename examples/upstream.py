"""Two upstream pipelines: one runs the training itself, one only says that its data is ready."""

from __future__ import annotations

from uuid import uuid4

from prefect import flow, get_run_logger, task
from prefect.deployments import run_deployment
from prefect.events import emit_event


@task
def prepare_data() -> int:
    """Stands where your own preparation would; here it only counts what the example will train on."""
    from sklearn.datasets import load_digits

    return len(load_digits().target)


@flow
def prepare_then_train(deployment: str = "train/local") -> str:
    """Prepare the data, then train on it, as one flow: the training is a subflow that is waited for."""
    images = prepare_data()
    get_run_logger().info("prepared images=%s", images)
    run = run_deployment(deployment, as_subflow=True)
    state = run.state
    if state is None or not state.is_completed():
        raise RuntimeError(f"the training did not complete: {state}")
    return str(run.id)


@flow
def prepare_then_announce(dataset: str = "digits") -> str:
    """Prepare the data and announce it. `train/on-data-ready` has a trigger for this event."""
    images = prepare_data()
    run_id = f"{dataset}-{uuid4().hex[:8]}"
    emit_event(
        "data.ready",
        resource={"prefect.resource.id": f"dataset.{dataset}"},
        payload={"images": images, "run_id": run_id},
    )
    get_run_logger().info("announced dataset=%s run_id=%s", dataset, run_id)
    return run_id
