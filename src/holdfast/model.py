"""What the user asks for. Validated here, completely, before anything is spent."""

from __future__ import annotations

import difflib
import re
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import yaml
from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from holdfast.errors import ConfigError

PositiveSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


INTERVAL = re.compile(r"^\s*([-+]?[0-9]+(?:\.[0-9]+)?)\s*(steps?|s|seconds?|minutes?|min)\s*$")


def parse_interval(text: str) -> tuple[Literal["auto", "steps", "seconds"], float]:
    """'auto', '100 steps', '30 s', '5 minutes' as (unit, number). Raises ValueError for anything else."""
    if text.strip() == "auto":
        return "auto", 0.0
    match = INTERVAL.match(text)
    if not match:
        raise ValueError(f"checkpointing.every is {text!r}; write '100 steps', '30 s', '5 minutes' or 'auto'")
    number, unit = float(match[1]), match[2]
    if number <= 0 or (unit.startswith("step") and number != int(number)):
        raise ValueError(f"checkpointing.every is {text!r}; the number must be above zero, and steps whole")
    if unit.startswith("step"):
        return "steps", number
    return "seconds", number * (60 if unit.startswith("min") else 1)


def _name_the_known_keys(schema: dict[str, Any]) -> None:
    # Prefect checks parameters against this schema first. Of a key that is not allowed it would say only that; of a
    # name outside a list it says the list.
    schema.pop("additionalProperties", None)
    schema["propertyNames"] = {"enum": list(schema["properties"])}


class Strict(BaseModel):
    """Refuses keys it does not know, and says which one was probably meant."""

    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_extra=_name_the_known_keys)

    @model_validator(mode="before")
    @classmethod
    def _suggest_known_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    close = difflib.get_close_matches(str(key), cls.model_fields, n=1, cutoff=0.5)
                    hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(cls.model_fields)}"
                    raise ValueError(f"{key!r} is no key of {cls.__name__}: {hint}")
        return data


class Resources(Strict):
    """What one machine must have. Pools that have less are never considered."""

    instance_types: list[str] = Field([], title="Instance types", description="Only these; empty: any that fits.")
    zones: list[str] = Field([], title="Zones", description="Only these; empty: every zone of the account.")
    regions: list[str] = Field([], title="Regions", description="Only these; empty: every region of the account.")
    vcpus: int = Field(0, ge=0, title="vCPUs", description="At least so many.")
    memory_gib: float = Field(0, ge=0, title="Memory (GiB)", description="At least so much.")
    gpus: int = Field(0, ge=0, title="GPUs", description="At least so many on one machine.")
    gpu_name: str = Field("", title="GPU name", description="For example A10G, L4, A100, H100; empty: any.")

    disk_gib: float = Field(0, ge=0, title="Disk (GiB)", description="Size of the root volume at least.")

    @model_validator(mode="after")
    def _agree(self) -> Resources:
        if self.gpu_name and not self.gpus:
            raise ValueError(
                f"resources.gpu_name is {self.gpu_name!r} but resources.gpus is 0: they contradict each other; "
                "set gpus to at least 1, or drop gpu_name"
            )
        return self


class Environment(Strict):
    """What the program runs in. By default the Python of the machine's image, as it is."""

    python: str = Field(
        "",
        title="Python",
        description="The image's interpreter. Empty: the one of its PyTorch (/opt/pytorch, /opt/conda), else python3.",
    )
    requirements: str = Field(
        "", title="Lock file", description="A requirements file below the code folder, installed on top at boot."
    )
    container: str = Field(
        "", title="Container", description="An image reference; the program runs in it, with the machine's GPUs."
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Environment:
        if self.requirements and self.container:
            raise ValueError(
                f"environment.requirements {self.requirements!r} and environment.container {self.container!r} contradict "
                "each other: a container brings its own packages; drop one of the two"
            )
        return self


class Checkpointing(Strict):
    """When the training state is saved, and how many checkpoints are kept."""

    every: str = Field(
        "auto",
        title="Save every",
        description="'100 steps', '30 s', or 'auto': the spacing that loses least, from the measured cost of a save "
        "and the pool's interruption rate (Young/Daly).",
    )
    max_to_keep: int = Field(3, ge=1, title="Checkpoints kept", description="Older ones are deleted after a commit.")
    compression: Literal["auto", "off"] = Field(
        "auto",
        title="Compression",
        description="auto: where it was measured to shorten the time to durable (needs zstandard and numpy on the machine).",
    )

    @model_validator(mode="after")
    def _readable(self) -> Checkpointing:
        parse_interval(self.every)
        return self


class Fallback(Strict):
    """When spot is given up for on-demand."""

    after_failed_spot_attempts: int = Field(
        3,
        ge=1,
        title="Failed spot attempts in a row",
        description="An attempt fails when it is refused for capacity, or is preempted before enough new progress.",
    )
    progress_to_reset: int | None = Field(
        None,
        ge=1,
        title="Steps that count as progress",
        description="New committed steps after which a preempted attempt does not count as failed. Empty: any new "
        "commit beyond half a checkpoint interval.",
    )
    return_to_spot_after_seconds: PositiveSeconds | None = Field(
        None,
        title="Return to spot after (seconds)",
        description="On-demand machines are left for spot again after so long, at a commit. Empty: never.",
    )


ProgramFailures = Annotated[
    int,
    Field(ge=0, title="Retries of a failing program", description="How often a program that fails is started again."),
]
RunHours = Annotated[
    PositiveSeconds,
    Field(title="Hours at most", description="Machine hours the run may use in all; sets the worst-case cost."),
]
LeaseSeconds = Annotated[
    PositiveSeconds,
    Field(title="Lease (seconds)", description="A machine ends itself when nobody has supervised it for so long."),
]
NoticePollSeconds = Annotated[
    PositiveSeconds,
    Field(title="Notice poll (seconds)", description="How often the machine looks for an interruption notice."),
]


ProcessesPerMachine = Annotated[
    int,
    Field(
        ge=0,
        title="Processes per machine",
        description="Ranks that torchrun starts on each machine; 0: one per GPU, and one where there is none.",
    ),
]


class Job(Strict):
    """A program and the machines it needs: what every kind of job says first. Each kind declares the limits after its
    own fields, so that they come last in forms and messages.
    """

    name: str = Field(
        title="Name", description="Letters, digits and dashes; names the runs.", pattern=r"^[a-z0-9][a-z0-9-]{0,40}$"
    )
    script: str = Field("", title="Script", description="A Python file below the code folder.")
    module: str = Field("", title="Module", description="Run as python -m MODULE, from the code folder.")
    command: list[str] = Field([], title="Command", description="Any program and its arguments, instead of a script.")
    args: list[str] = Field([], title="Arguments", description="Passed on to the script, module or command as given.")
    env: dict[str, str] = Field(
        {}, title="Environment", description="Passed on to the program. No secrets: it is stored with the run."
    )
    code: str = Field(
        ".", title="Code folder", description="Sent to the machine as it is; hidden and .holdfastignore'd files stay."
    )
    resources: Resources = Field(Resources(), title="Resources")
    environment: Environment = Field(Environment(), title="Environment")

    @model_validator(mode="after")
    def _one_program(self) -> Self:
        named = [name for name in ("script", "module", "command") if getattr(self, name)]
        if len(named) != 1:
            raise ValueError(
                f"a job names exactly one of script, module and command; this one names {' and '.join(named) or 'none'}"
            )
        reserved = sorted(key for key in self.env if key.startswith("HOLDFAST_"))
        if reserved:
            raise ValueError(f"env.{reserved[0]}: names that begin with HOLDFAST_ are ours; choose another")
        return self


Deadline = Annotated[
    AwareDatetime | None,
    Field(
        title="Deadline",
        description="Finish before this instant, at the least expected cost; with a time zone: 2026-12-01T08:00Z. "
        "Empty: no hurry.",
    ),
]
DeadlineHours = Annotated[
    PositiveSeconds | None,
    Field(title="Deadline (hours)", description="The same, so many hours after the run's start. Empty: no hurry."),
]
WorkHours = Annotated[
    PositiveSeconds | None,
    Field(
        title="Hours of work",
        description="Useful machine hours that the whole job takes. Empty: as calibrated, or as measured while it trains.",
    ),
]


class Deadlined(Job):
    """A job that has an amount of work, which may have to be done by some time."""

    deadline: Deadline = None
    deadline_hours: DeadlineHours = None

    @field_validator("deadline", mode="before")
    @classmethod
    def _with_a_time_zone(cls, deadline: Any) -> Any:
        if isinstance(deadline, str):
            try:
                deadline = datetime.fromisoformat(deadline.strip())
            except ValueError:
                raise ValueError(f"{deadline!r} is no instant; write it like 2026-12-01T08:00Z") from None
        if isinstance(deadline, date) and (not isinstance(deadline, datetime) or deadline.tzinfo is None):
            raise ValueError(f"{deadline.isoformat()} has no time zone; write it like 2026-12-01T08:00Z")
        if deadline is not None and not isinstance(deadline, datetime):
            raise ValueError(f"{deadline!r} is no instant; write it like 2026-12-01T08:00Z")
        return deadline

    @model_validator(mode="after")
    def _one_deadline(self) -> Self:
        if self.deadline and self.deadline_hours:
            raise ValueError(
                f"deadline {self.deadline.isoformat()} and deadline_hours {self.deadline_hours:g} contradict each other; "
                "give one of them"
            )
        return self

    @property
    def has_deadline(self) -> bool:
        return self.deadline is not None or self.deadline_hours is not None

    def deadline_at(self, started_at: datetime) -> datetime | None:
        """On the cloud's clock; None: no hurry."""
        if self.deadline_hours is not None:
            return started_at + timedelta(hours=self.deadline_hours)
        return self.deadline


class TrainingJob(Deadlined):
    """A program to be trained to its end, however often its machine is taken away."""

    work_hours: WorkHours = None
    policy: str = Field(
        "",
        title="Policy",
        description="Who decides between spot, on-demand and waiting. Empty: the best one for a deadline where the job has "
        "one, else spot until three attempts in a row failed.",
    )
    checkpointing: Checkpointing = Field(Checkpointing(), title="Checkpoints")
    fallback: Fallback = Field(Fallback(), title="Fallback to on-demand")
    provisioning: Literal["spot-then-on-demand", "spot", "on-demand"] = Field(
        "spot-then-on-demand", title="Provisioning", description="Which provisioning models may be used."
    )
    max_attempts: int = Field(50, ge=1, title="Attempts at most", description="Machines asked for, refusals included.")
    processes_per_machine: ProcessesPerMachine = 1
    max_usd: PositiveSeconds | None = Field(
        None,
        title="Dollars at most",
        description="The run may cost so much in all: shortly before, it commits, stops, and says so. Empty: max_run_hours "
        "at the on-demand price.",
    )
    max_program_failures: ProgramFailures = 0
    max_run_hours: RunHours = 24.0
    lease_seconds: LeaseSeconds = 900.0
    notice_poll_seconds: NoticePollSeconds = 5.0

    @model_validator(mode="after")
    def _torchrun_starts_python(self) -> TrainingJob:
        if self.command and self.processes_per_machine != 1:
            raise ValueError(
                f"processes_per_machine is {self.processes_per_machine}: torchrun starts a script or a module, not a "
                "command; name one of them, or let the command start its own processes"
            )
        return self

    @model_validator(mode="after")
    def _on_demand_where_there_is_a_deadline(self) -> TrainingJob:
        if self.has_deadline and self.provisioning == "spot":
            raise ValueError(
                "provisioning 'spot' contradicts a deadline: only on-demand is sure to be had; drop one of the two"
            )
        return self

    @model_validator(mode="after")
    def _no_way_back_to_spot_without_it(self) -> TrainingJob:
        if self.provisioning == "on-demand" and self.fallback.return_to_spot_after_seconds:
            raise ValueError(
                "fallback.return_to_spot_after_seconds contradicts provisioning 'on-demand'; drop one of the two"
            )
        return self


SpotShare = Annotated[
    float,
    Field(ge=0, le=1, title="Spot share", description="0.8: of ten machines, eight are spot and two on-demand."),
]


class FleetJob(Job):
    """A program that many machines run at once, a share of them spot."""

    machines: int = Field(ge=1, le=1000, title="Machines", description="That run the program at the same time.")
    spot_share: SpotShare = 1.0
    kind: Literal["instant", "maintained"] = Field(
        "instant",
        title="Kind",
        description="instant: every machine runs the program to its end, and what is taken is replaced. maintained: the "
        "cloud keeps the number up until the run is cancelled or its max_run_hours are used up.",
    )
    max_replacements: int = Field(
        1000,
        ge=0,
        title="Replacements at most",
        description="Machines launched in place of others; a refusal counts as one. Of a maintained fleet the cloud "
        "replaces as many as it must.",
    )
    max_program_failures: ProgramFailures = 0
    max_run_hours: RunHours = 24.0
    lease_seconds: LeaseSeconds = 900.0
    notice_poll_seconds: NoticePollSeconds = 5.0

    @model_validator(mode="after")
    def _a_maintained_fleet_says_for_how_long(self) -> FleetJob:
        if self.kind == "maintained" and "max_run_hours" not in self.model_fields_set:
            raise ValueError(
                "kind is 'maintained', which ends when max_run_hours are used up, and none are given; say how many "
                "machine hours the fleet may use"
            )
        return self


class GangJob(Job):
    """One training run on many machines at once: torchrun's ranks, all of them, or as many as can be had."""

    machines: int = Field(ge=1, le=100, title="Machines", description="That train together when all can be had.")
    min_machines: int = Field(
        1, ge=1, title="Machines at least", description="With so many the training goes on while others are replaced."
    )
    processes_per_machine: ProcessesPerMachine = 0
    spot_share: SpotShare = 1.0
    checkpointing: Checkpointing = Field(Checkpointing(), title="Checkpoints")
    max_replacements: int = Field(
        1000,
        ge=0,
        title="Replacements at most",
        description="Machines launched in place of others; a refusal counts as one.",
    )
    max_program_failures: ProgramFailures = 0
    max_run_hours: RunHours = 24.0
    lease_seconds: LeaseSeconds = 900.0
    notice_poll_seconds: NoticePollSeconds = 5.0

    kind: ClassVar[Literal["instant"]] = "instant"
    """What is taken is replaced by the run, not by the cloud."""

    @model_validator(mode="after")
    def _can_be_formed(self) -> GangJob:
        if self.min_machines > self.machines:
            raise ValueError(
                f"min_machines is {self.min_machines}, more than the {self.machines} machines there are to be; lower the "
                "one, or raise the other"
            )
        if self.command:
            raise ValueError("a gang's ranks are started by torchrun, which needs a script or a module, not a command")
        return self


FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class BatchJob(Deadlined):
    """A function that many machines apply to the records of a data set, each record once."""

    # What the machines run is ours; the user's own is the function.
    script: ClassVar[str] = ""
    module: ClassVar[str] = "holdfast.batch.several"
    command: ClassVar[list[str]] = []
    args: ClassVar[list[str]] = []
    kind: ClassVar[Literal["instant"]] = "instant"

    inputs: list[str] = Field(
        min_length=1,
        title="Inputs",
        description="Files, folders and globs of them, here or as s3:// and gs://: JSONL, Parquet or text.",
    )
    input_format: Literal["auto", "jsonl", "parquet", "text"] = Field(
        "auto", title="Format of the inputs", description="auto: by the names of the files."
    )
    function: str = Field(
        title="Function",
        description="MODULE:NAME below the code folder; turns a list of records into a list of as many results.",
    )
    setup: str = Field(
        "",
        title="Setup",
        description="MODULE:NAME, called once in each worker; what it returns is the function's second argument, if it has two.",
    )
    results: str = Field(
        "",
        title="Results",
        description="A prefix in the store, or a URL below it. Empty: results/ and the name of the run.",
    )
    results_format: Literal["jsonl", "parquet"] = Field(
        "jsonl", title="Format of the results", description="Of the parts of the data set that is made."
    )
    batch_size: int = Field(
        100, ge=1, le=1_000_000, title="Batch size", description="Records that the function is given at once."
    )
    machines: int = Field(ge=1, le=1000, title="Machines", description="At most, at the same time.")
    workers_per_machine: int = Field(
        0, ge=0, le=256, title="Workers per machine", description="0: one for each GPU, and one where there is none."
    )
    spot_share: SpotShare = 1.0
    queue: str = Field(
        "",
        title="Queue",
        description="sqlite:///PATH, redis://, amqp://, sqs://, pubsub:// ... Empty: one that needs no server, a file on the "
        "local cloud and the store itself on others.",
    )
    visibility_seconds: PositiveSeconds = Field(
        600.0,
        title="Visibility (seconds)",
        description="A batch whose worker was not heard of for so long is given to another; a live worker extends it.",
    )
    batch_time_limit_seconds: PositiveSeconds = Field(
        600.0,
        title="Time limit of a batch (seconds)",
        description="A function that takes longer is killed, and the record that makes it hang is looked for.",
    )
    max_deliveries: int = Field(
        5,
        ge=1,
        le=1000,
        title="Deliveries at most",
        description="Workers that may die over one batch before it is given up.",
    )
    max_failed_share: float = Field(
        1.0,
        ge=0,
        le=1,
        title="Failed share at most",
        description="Of the records: when more have failed, the run ends. 1: failed records are only written down.",
    )
    idle_seconds: PositiveSeconds = Field(
        20.0, title="Idle (seconds)", description="A machine that got no batch for so long ends itself."
    )
    max_usd: PositiveSeconds | None = Field(
        None,
        title="Dollars at most",
        description="The run may cost so much in all: shortly before, its machines are stopped. Empty: max_run_hours at the "
        "on-demand price.",
    )
    max_replacements: int = Field(
        1000,
        ge=0,
        title="Replacements at most",
        description="Machines launched in place of others; a refusal counts as one.",
    )
    max_program_failures: Annotated[
        int,
        Field(
            ge=0, title="Failures of workers", description="Machines on which workers may fail before the run is ended."
        ),
    ] = 3
    max_run_hours: RunHours = 24.0
    lease_seconds: LeaseSeconds = 900.0
    notice_poll_seconds: NoticePollSeconds = 5.0

    @field_validator("inputs", mode="before")
    @classmethod
    def _one_or_many(cls, inputs: Any) -> Any:
        return [inputs] if isinstance(inputs, str) else inputs

    @field_validator("function", "setup")
    @classmethod
    def _module_and_name(cls, function: str, info: ValidationInfo) -> str:
        if function and (not FUNCTION.fullmatch(function) or ".py:" in function):
            raise ValueError("write MODULE:NAME, such as embed:embed for the function embed in embed.py")
        if not function and info.field_name == "function":
            raise ValueError("name the function that turns records into results, as MODULE:NAME")
        return function

    @model_validator(mode="after")
    def _the_limit_can_be_reached(self) -> BatchJob:
        limit = self.batch_time_limit_seconds
        if limit > self.max_run_hours * 3600:
            raise ValueError(
                f"batch_time_limit_seconds is {limit:g}, more than all of max_run_hours, {self.max_run_hours:g}; lower the one, "
                "or raise the other"
            )
        return self


class Haproxy(Strict):
    """An haproxy (2.6 or newer), told of replicas over its runtime API."""

    kind: Literal["haproxy"] = "haproxy"
    listen: str = Field(
        "127.0.0.1:8080",
        title="Listen",
        description="Host and port of the one that Holdfast starts beside the orchestrator.",
        pattern=r"^[^\s:]*:[0-9]{1,5}$",
    )
    socket: str = Field(
        "", title="Socket", description="Runtime API of one that you run: a path, or host:port. Empty: one is started."
    )
    backend: str = Field("holdfast", title="Backend", pattern=r"^[A-Za-z0-9_.:-]+$", description="That replicas join.")


class TargetGroup(Strict):
    """A target group of an AWS load balancer."""

    kind: Literal["target-group"] = "target-group"
    arn: str = Field(
        title="ARN",
        description="Of the target group: targets by instance or by IP, health check on /healthz at the health port.",
        pattern=r"^arn:aws[a-z-]*:elasticloadbalancing:[a-z0-9-]+:[0-9]+:targetgroup/\S+$",
    )

    @property
    def region(self) -> str:
        return self.arn.split(":")[3]


class EndpointGroups(Strict):
    """Zonal network endpoint groups of a Google Cloud backend service, one of this name in each zone."""

    kind: Literal["endpoint-groups"] = "endpoint-groups"
    name: str = Field(
        title="Name",
        description="Of the groups, of type GCE_VM_IP_PORT; the backend service checks /healthz at the health port.",
        pattern=r"^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$",
    )


def _named_briefly(value: Any) -> Any:
    """`haproxy`, the ARN of a target group, or `networkEndpointGroups/NAME`; of a mapping without a kind, it is haproxy."""
    if isinstance(value, dict) and "kind" not in value:
        return {"kind": "haproxy", **value}
    if not isinstance(value, str):
        return value
    if value == "haproxy":
        return {"kind": value}
    if value.startswith("arn:"):
        return {"kind": "target-group", "arn": value}
    if "networkEndpointGroups/" in value:
        return {"kind": "endpoint-groups", "name": value.rpartition("/")[2]}
    raise ValueError("write haproxy, the ARN of a target group, or networkEndpointGroups/NAME")


class ServeJob(Job):
    """A model server, run as replicas behind a load balancer until it is cancelled or its hours are used up."""

    replicas: int = Field(ge=1, le=500, title="Replicas", description="That serve at the same time.")
    max_machines: int | None = Field(
        None,
        ge=1,
        title="Machines at most",
        description="Replacements that start while the old ones still serve are counted too. Empty: twice the replicas.",
    )
    spot_share: SpotShare = 1.0
    port: int = Field(
        8000,
        ge=1024,
        le=65535,
        title="Port",
        description="On which the server listens: it finds it as HOLDFAST_PORT, and for {port} in its arguments. Machines "
        "that share one computer, as the local cloud's do, each get a free one.",
    )
    health_path: str = Field(
        "/health", title="Health path", pattern=r"^/\S*$", description="Of the server; healthy: it answers with 2xx."
    )
    health_port: int = Field(
        8001,
        ge=1024,
        le=65535,
        title="Health port",
        description="Where the machine answers /healthz to the load balancer: 200 while it is to get requests, else 503.",
    )
    load_balancer: Annotated[
        Annotated[Haproxy | TargetGroup | EndpointGroups, Field(discriminator="kind")], BeforeValidator(_named_briefly)
    ] = Field(
        Haproxy(), title="Load balancer", description="An haproxy, a target group of AWS, or groups of Google Cloud."
    )
    drain_seconds: PositiveSeconds = Field(
        60.0,
        title="Drain (seconds)",
        description="Requests in flight get so long to finish, and never beyond the notice.",
    )
    startup_seconds: PositiveSeconds = Field(
        1800.0, title="Start (seconds)", description="A replica that is not healthy so long after its start has failed."
    )
    max_program_failures: ProgramFailures = 2
    max_run_hours: RunHours
    lease_seconds: LeaseSeconds = 900.0
    notice_poll_seconds: NoticePollSeconds = 5.0

    kind: ClassVar[Literal["instant"]] = "instant"
    """What is taken is replaced by the run, not by the cloud."""
    max_replacements: ClassVar[int] = 10**9
    """Without end: hours and budget are the cap."""

    @property
    def machines(self) -> int:
        return self.replicas

    @property
    def most_machines(self) -> int:
        return self.max_machines or 2 * self.replicas

    @model_validator(mode="after")
    def _can_be_served(self) -> ServeJob:
        if self.most_machines < self.replicas:
            raise ValueError(
                f"max_machines is {self.max_machines}, fewer than the {self.replicas} replicas; raise the one, or lower the "
                "other"
            )
        if self.port == self.health_port:
            raise ValueError(
                f"port and health_port are both {self.port}: the server has the one, its watcher the other; change one"
            )
        return self


AnyJob = TypeVar("AnyJob", bound=Job)


def load_job(path: Path | str) -> TrainingJob:
    """The job in a YAML file; its `code` is taken relative to the file. Raises ConfigError with field and remedy."""
    return _load(path, TrainingJob)


def load_fleet_job(path: Path | str) -> FleetJob:
    """The same for a fleet."""
    return _load(path, FleetJob)


def load_gang_job(path: Path | str) -> GangJob:
    """The same for a gang."""
    return _load(path, GangJob)


def load_batch_job(path: Path | str) -> BatchJob:
    """The same for batch inference; its inputs are taken relative to the file too."""
    job = _load(path, BatchJob)
    folder = Path(path).parent.resolve()
    return job.model_copy(
        update={"inputs": [one if "://" in one else str(folder / Path(one).expanduser()) for one in job.inputs]}
    )


def load_serve_job(path: Path | str) -> ServeJob:
    """The same for a model server."""
    return _load(path, ServeJob)


def load_any_job(path: Path | str) -> TrainingJob | FleetJob | GangJob | BatchJob | ServeJob:
    """The job in a file, of whichever kind its keys tell; of one that may be a fleet's or a gang's, the fleet's."""
    return _load(path, _kinds_in(_read(Path(path)))[0])


def _read(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"job file {path}: {error.strerror}; name a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"job file {path} is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"job file {path}: expected keys and values (name: ..., script: ...), found {data!r}")
    return data


def _load(path: Path | str, kind: type[AnyJob]) -> AnyJob:
    path = Path(path)
    data = _read(path)
    if kind not in (holds := _kinds_in(data)):
        has = "none of" if TrainingJob in holds else "one of"
        names = ONLY_OF_MANY
        if ServeJob in (kind, *holds):
            names, has = ONLY_OF_SERVING, "one of" if holds == [ServeJob] else "none of"
        elif BatchJob in (kind, *holds):
            names, has = ONLY_OF_A_BATCH, "one of" if holds == [BatchJob] else "none of"
        elif holds == [GangJob]:
            names = (*ONLY_OF_A_GANG, *OF_A_GANG_BUT_NO_FLEET)
        raise ConfigError(
            f"job file {path}: it has {has} {', '.join(names)}, so it is a {holds[0].__name__}, for "
            f"python -m flows {COMMANDS[holds[0].__name__]}; use that, or write a {kind.__name__}"
        )
    try:
        job = kind.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"job file {path}: {validation_message(error)}") from error
    return job.model_copy(update={"code": str((path.parent / job.code).resolve())})


ONLY_OF_MANY = ("machines", "spot_share", "kind")
ONLY_OF_A_BATCH = ("inputs", "function", "setup", "results", "batch_size", "queue")
ONLY_OF_A_GANG = ("min_machines",)
ONLY_OF_SERVING = ("replicas", "load_balancer", "health_path", "port")
OF_A_GANG_BUT_NO_FLEET = ("checkpointing", "processes_per_machine")
COMMANDS = {"TrainingJob": "train", "FleetJob": "fleet", "GangJob": "gang", "BatchJob": "batch", "ServeJob": "serve"}


def _kinds_in(
    data: dict[str, Any],
) -> list[type[TrainingJob] | type[FleetJob] | type[GangJob] | type[BatchJob] | type[ServeJob]]:
    """What a file may be; `machines` alone are a fleet's or a gang's."""
    if any(key in data for key in ONLY_OF_SERVING):
        return [ServeJob]
    if any(key in data for key in ONLY_OF_A_BATCH):
        return [BatchJob]
    if any(key in data for key in ONLY_OF_A_GANG):
        return [GangJob]
    if not any(key in data for key in ONLY_OF_MANY):
        return [TrainingJob]
    if "kind" in data:
        return [FleetJob]
    return [GangJob] if any(key in data for key in OF_A_GANG_BUT_NO_FLEET) else [FleetJob, GangJob]


def validation_message(error: ValidationError) -> str:
    """Every complaint in one message: field, value, remedy."""
    lines = []
    for complaint in error.errors():
        field = ".".join(str(part) for part in complaint["loc"])
        message = complaint["msg"].removeprefix("Value error, ")
        value = complaint.get("input")
        shown = f" (got {value!r})" if field and not isinstance(value, dict) else ""
        lines.append(f"{field}: {message}{shown}" if field else message)
    return "; ".join(lines)
