"""One rank of a gang, with a checkpoint of its own making: it proves what gang provisioning owes a program, whoever saves.

Each step adds up what all ranks say (1 each): so many trained it. The program is done after STEPS steps of WORLD ranks.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

STEPS, WORLD, PAUSE_SECONDS = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
KEPT = Path(os.environ["KEPT"])
ATTEMPT, MEMBER = os.environ["HOLDFAST_ATTEMPT"], os.environ["HOLDFAST_MEMBER"]

console = os.open(os.environ["HOLDFAST_CONSOLE"], os.O_WRONLY | os.O_APPEND)
telemetry = os.open(os.environ["HOLDFAST_TELEMETRY"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def tell(kind: str, **fields: object) -> None:
    """Once per machine, as attach does."""
    if os.environ["LOCAL_RANK"] == "0":
        at = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
        os.write(telemetry, (json.dumps({"kind": kind, "at": at, **fields}) + "\n").encode())


torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
tell("attached")
kept = sorted(KEPT.glob("*.json"))
state = json.loads(kept[-1].read_text()) if kept else {"step": 0, "ranks": []}
tell("resumed", step=state["step"], load_seconds=0.0, checkpoint="")
print(f"attempt {ATTEMPT} rank {rank} of {world} on {MEMBER} from step {state['step']}", flush=True)
if os.environ.get("FAIL") and rank == world - 1:
    sys.exit("this rank fails")


def save() -> None:
    if rank == 0:
        KEPT.mkdir(parents=True, exist_ok=True)
        path = KEPT / f"{int(ATTEMPT):04d}-{state['step']:06d}.json"
        path.with_suffix(".staged").write_text(json.dumps(state))
        path.with_suffix(".staged").rename(path)
        tell("committed", step=state["step"], bytes=1)


while state["ranks"].count(WORLD) < STEPS:
    # What each knows of a notice is agreed on with the step itself.
    said = torch.tensor([1.0, float(Path(os.environ["HOLDFAST_NOTICE"]).exists())])
    dist.all_reduce(said)
    state["step"] += 1
    state["ranks"].append(int(said[0]))
    if os.environ["LOCAL_RANK"] == "0":
        os.write(console, f"\nholdfast: step {state['step']} {{}}\n".encode())
    if rank == 0:
        tell("progress", step=state["step"], total_steps=None, metrics={"ranks": float(said[0])})
    if said[1]:
        save()
        tell("preempting", step=state["step"], committed=True)
        dist.barrier()
        sys.exit(83)
    if state["step"] % 10 == 0:
        save()
    time.sleep(PAUSE_SECONDS)
save()
tell("finished", step=state["step"])
dist.barrier()
dist.destroy_process_group()
