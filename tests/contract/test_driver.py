"""What Holdfast asks of a cloud. The local cloud passes this with real processes that are really killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from holdfast.drivers.local import LocalDriver, processes
from holdfast.drivers.local import machine_files as files
from holdfast.drivers.local.config import Fate, ScriptedMarket, SeededMarket
from holdfast.drivers.local.processes import marked
from holdfast.drivers.protocol import CapacityPool
from holdfast.errors import CapacityError, ConfigError
from holdfast.process_identity import lives
from tests.contract.machines import (
    AWS_POOL,
    GCP_POOL,
    SLEEP,
    described,
    driver_of,
    ended,
    line_of,
    nothing_left,
    request,
    wait_for,
)

Make = Callable[..., LocalDriver]
START = datetime(2026, 11, 1, tzinfo=UTC)
LATE = f"i-late-{os.getpid()}"
"""Of this process alone: processes are ended by their machine's id, and other tests run beside this one."""
HEAD = """
import sys
from pathlib import Path
from holdfast.errors import CapacityError
from holdfast.drivers.local.config import Fate, SeededMarket
from tests.contract.machines import AWS_POOL, driver_of, request
"""


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """A driver of one and the same cloud; what lives in it ends with the test."""

    def make(*fates: Fate, **changes: Any) -> LocalDriver:
        return driver_of(tmp_path / "cloud", *fates, **changes)

    yield make
    with nothing_left(driver_of(tmp_path / "cloud", **made_with(tmp_path / "cloud"))):
        pass


def made_with(root: Path) -> dict[str, Any]:
    kept = files.read_json(root / "clock.json")
    return {"clock_speed": kept["speed"]} if kept else {}


def in_another_process(program: str, root: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HEAD + program, str(root), *arguments],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


# -- launching --------------------------------------------------------------------------------------------------------


def test_a_launched_machine_runs_its_script_with_its_environment_and_ends_itself(make: Make) -> None:
    driver = make()
    asked = request("run-1", 'echo "says: $GREETING"', environment={"GREETING": "it's $HOME"})
    before = driver.clock.now()
    machine = driver.launch(asked)
    over = ended(driver, machine)
    assert line_of(driver, machine, "says: ") == "it's $HOME"
    assert (over.reason, over.pool, dict(over.tags)) == ("ended-itself", AWS_POOL, {"holdfast-run": "run"})
    assert over.terminated_at and before <= over.launched_at <= over.terminated_at <= driver.clock.now()


def test_a_repeated_launch_adopts_the_machine_and_buys_no_second_one(make: Make) -> None:
    driver = make()
    once, again = driver.launch(request("run-1")), make().launch(request("run-1"))
    assert (again.id, again.launched_at) == (once.id, once.launched_at)
    driver.terminate(once.id, once.pool)
    ended(driver, once)
    assert driver.launch(request("run-1")).state == "terminated"  # its token is used up, dead or alive
    assert len(driver.machines({})) == 1


def test_two_processes_that_launch_one_token_at_once_get_one_machine(make: Make, tmp_path: Path) -> None:
    driver = make()
    racers = [
        in_another_process(
            """
from concurrent.futures import ThreadPoolExecutor
driver = driver_of(Path(sys.argv[1]))
input()
for number in range(3):
    with ThreadPoolExecutor(4) as pool:
        asked = [request(f"run-{number}", "echo started; exec sleep 300")] * 4
        print(*{machine.id for machine in pool.map(driver.launch, asked)})
""",
            tmp_path / "cloud",
        )
        for _ in range(2)
    ]
    for racer in racers:
        assert racer.stdin
        racer.stdin.write("go\n")
        racer.stdin.flush()
    one, other = (racer.communicate(timeout=60)[0].split() for racer in racers)
    assert one == other and len(set(one)) == len(one) == 3
    machines = driver.machines({})
    assert sorted(machine.id for machine in machines) == sorted(one)
    for machine in machines:
        line_of(driver, machine, "started")
        assert driver.console(machine.id, machine.pool) == "started\n"


def test_a_refusal_is_kept_whoever_asks_again(make: Make) -> None:
    for driver in (make(Fate(refuse=True)), make(Fate(refuse=True))):
        with pytest.raises(CapacityError, match=r"no spot capacity for c7i\.large in local-1a"):
            driver.launch(request("run-1"))
    assert make().launch(request("run-2")).state == "running"
    assert len(make().machines({})) == 1


def test_launches_that_race_meet_the_scripted_fates_in_order_each_once(make: Make, tmp_path: Path) -> None:
    driver = make()
    racers = [
        in_another_process(
            """
fates = [Fate(refuse=True), Fate(after_seconds=0.01, notice=False), Fate(refuse=True), Fate()]
driver = driver_of(Path(sys.argv[1]), *fates)
input()
for number in range(2):
    try:
        driver.launch(request(f"{sys.argv[2]}-{number}"))
        print("launched")
    except CapacityError:
        print("refused")
""",
            tmp_path / "cloud",
            name,
        )
        for name in "ab"
    ]
    for racer in racers:
        assert racer.stdin
        racer.stdin.write("go\n")
        racer.stdin.flush()
    answers = [answer for racer in racers for answer in racer.communicate(timeout=60)[0].split()]
    assert sorted(answers) == ["launched", "launched", "refused", "refused"]
    wait_for(lambda: sorted(machine.reason for machine in driver.machines({})) == ["", "preempted"])


@pytest.mark.parametrize(
    "pool",
    [
        CapacityPool("local", "local-1", "local-1a", "c7i.huge", "spot"),
        CapacityPool("local", "local-1", "nowhere", "c7i.large", "spot"),
        CapacityPool("local", "local-1", "local-1a", "n2-standard-2", "spot"),
    ],
)
def test_a_pool_that_does_not_exist_is_refused_by_name(make: Make, pool: CapacityPool) -> None:
    with pytest.raises(ConfigError, match=f"{pool.instance_type}.*{pool.zone}"):
        make().launch(request("run-1", pool=pool))


# -- describing and ending --------------------------------------------------------------------------------------------


def test_machines_are_found_by_all_of_their_tags_the_terminated_ones_too(make: Make) -> None:
    driver = make()
    for run, attempt, script in (("a", "1", "true"), ("a", "2", SLEEP), ("b", "1", SLEEP)):
        driver.launch(request(f"{run}-{attempt}", script, tags={"holdfast-run": run, "holdfast-attempt": attempt}))
    (gone,) = driver.machines({"holdfast-run": "a", "holdfast-attempt": "1"})
    ended(driver, gone)

    def found(**tags: str) -> list[tuple[str, str]]:
        machines = driver.machines({f"holdfast-{name}": value for name, value in tags.items()})
        return sorted((machine.tags["holdfast-run"], machine.state) for machine in machines)

    assert found() == [("a", "running"), ("a", "terminated"), ("b", "running")]
    assert found(run="a") == [("a", "running"), ("a", "terminated")]
    assert found(run="b", attempt="1") == [("b", "running")]
    assert found(run="b", attempt="2") == found(run="c") == found(color="red") == []


def test_a_terminated_machine_may_say_its_last_words(make: Make) -> None:
    driver = make()
    machine = driver.launch(request("run-1", "trap 'echo bye; exit' TERM\necho up\nwhile :; do sleep 0.01; done"))
    line_of(driver, machine, "up")
    driver.terminate(machine.id, machine.pool)
    assert described(driver, machine).state in ("stopping", "terminated")
    assert ended(driver, machine).reason == "terminated-by-user"
    assert driver.console(machine.id, machine.pool).splitlines()[-1] == "bye"
    assert marked(machine.id) == []


def test_a_machine_that_ignores_the_shutdown_is_switched_off(make: Make) -> None:
    driver = make()
    machine = driver.launch(request("run-1", "trap '' TERM\necho up\nwhile :; do sleep 0.01; done"))
    line_of(driver, machine, "up")
    driver.terminate(machine.id, machine.pool)
    assert ended(driver, machine).reason == "terminated-by-user"
    assert marked(machine.id) == []


def test_terminating_what_is_gone_or_never_was_is_no_error(make: Make) -> None:
    driver = make()
    machine = driver.launch(request("run-1", "true"))
    over = ended(driver, machine)
    for machine_id in (machine.id, "i-00000000000000000", "../machines", ""):
        driver.terminate(machine_id, AWS_POOL)
    assert described(driver, machine) == over
    assert driver.console("i-00000000000000000", AWS_POOL) == ""


def test_the_console_s_last_64_kib_outlive_the_machine(make: Make) -> None:
    driver = make()
    machine = driver.launch(request("run-1", "for n in $(seq 20000); do echo line $n; done; echo the end"))
    ended(driver, machine)
    console = driver.console(machine.id, machine.pool)
    assert console.endswith("line 20000\nthe end\n")
    assert len(console) == 64 * 1024


@pytest.mark.parametrize("end", ["ends itself", "terminated", "its host dies"])
def test_a_machine_s_disks_are_gone_with_it_and_its_console_stays(make: Make, tmp_path: Path, end: str) -> None:
    driver = make()
    script = f"""mkdir -p work/code && echo x > work/code/train.py && echo x > $HOME/cache && echo x > $TMPDIR/scratch
echo up
{"exit" if end == "ends itself" else SLEEP}"""
    machine = driver.launch(request("run-1", script))
    line_of(driver, machine, "up")
    folder = tmp_path / "cloud" / "machines" / machine.id
    if end == "terminated":
        driver.terminate(machine.id, machine.pool)
    elif end == "its host dies":
        os.kill((files.read_json(folder / files.RUNNING) or {})["pid"], signal.SIGKILL)
    ended(driver, machine)
    wait_for(lambda: not any(path.is_dir() for path in folder.iterdir()))
    assert driver.console(machine.id, machine.pool) == "up\n"
    assert {files.SPEC, files.END} <= {path.name for path in folder.iterdir()}


# -- surviving --------------------------------------------------------------------------------------------------------


def test_a_machine_outlives_the_process_that_launched_it_and_another_ends_it(make: Make, tmp_path: Path) -> None:
    launcher = in_another_process(
        "print(driver_of(Path(sys.argv[1])).launch(request('run-1')).id, flush=True)\ninput()", tmp_path / "cloud"
    )
    assert launcher.stdout
    machine_id = launcher.stdout.readline().strip()
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.communicate()
    driver = make()
    (machine,) = driver.machines({"holdfast-run": "run"})
    assert (machine.id, machine.state) == (machine_id, "running")
    driver.terminate(machine_id, AWS_POOL)
    assert ended(driver, machine).reason == "terminated-by-user"
    assert marked(machine_id) == []


DAEMON = """
import os, sys, time
if os.fork(): os._exit(0)
os.setsid()
if os.fork(): os._exit(0)
open("daemon.pid.staged", "w").write(str(os.getpid()))
os.rename("daemon.pid.staged", "daemon.pid")
time.sleep(300)
"""


@pytest.mark.parametrize("environment", ["", "env -i "], ids=["as it is", "with the mark taken off"])
@pytest.mark.parametrize("end", ["ends itself", "terminated", "preempted"])
def test_a_daemon_that_left_the_machine_s_group_is_dead_after_its_end(
    make: Make, tmp_path: Path, environment: str, end: str
) -> None:
    driver = make(Fate(at_step=1, notice=False) if end == "preempted" else Fate())
    script = f"""
{environment}{sys.executable} -c '{DAEMON}'
until [ -e daemon.pid ]; do sleep 0.01; done
echo daemon: $(cat daemon.pid)
echo "holdfast: step 1"
{"exit" if end == "ends itself" else SLEEP}
"""
    machine = driver.launch(request("run-1", script))
    daemon = int(line_of(driver, machine, "daemon: "))
    if end == "terminated":
        driver.terminate(machine.id, machine.pool)
    expected = {"ends itself": "ended-itself", "terminated": "terminated-by-user", "preempted": "preempted"}
    assert ended(driver, machine).reason == expected[end]
    assert not alive(daemon)


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_host_that_is_killed_is_noticed_and_leaves_no_process(make: Make, tmp_path: Path) -> None:
    driver = make()
    machine = driver.launch(request("run-1", "sleep 300 & setsid sleep 300 &\necho up\nwait"))
    line_of(driver, machine, "up")
    host = files.read_json(tmp_path / "cloud" / "machines" / machine.id / files.RUNNING)
    assert host
    os.kill(host["pid"], signal.SIGKILL)
    assert len(wait_for(lambda: marked(machine.id))) >= 3
    over = ended(driver, machine)
    assert (over.reason, over.detail) == ("host-failed", "the machine's host died")
    assert marked(machine.id) == []


def given_up(make: Make, tmp_path: Path) -> tuple[LocalDriver, Path]:
    """A machine whose host was never started: the launching process died in between, a minute ago."""
    driver = make()
    original = driver.launch(request("run-0", "true"))
    ended(driver, original)
    machines = tmp_path / "cloud" / "machines"
    spec = {**(files.read_json(machines / original.id / files.SPEC) or {}), "id": LATE, "startup_script": SLEEP}
    (machines / LATE).mkdir()
    files.write_json(machines / LATE / files.SPEC, spec)
    minute_ago = time.time() - 60
    os.utime(machines / LATE / files.SPEC, (minute_ago, minute_ago))
    return driver, machines / LATE


def start_host(folder: Path, program: Sequence[str] = ("-m", "holdfast.drivers.local.host")) -> subprocess.Popen[bytes]:
    environment = {**os.environ, files.HOST_MARK: folder.name}
    return subprocess.Popen([sys.executable, *program, str(folder)], cwd=folder, env=environment)


def test_a_host_that_comes_up_after_it_was_given_up_starts_no_machine(make: Make, tmp_path: Path) -> None:
    driver, folder = given_up(make, tmp_path)
    assert [machine.reason for machine in driver.machines({}) if machine.id == LATE] == ["host-failed"]
    assert start_host(folder).wait(30) == 0
    assert not (folder / files.RUNNING).exists() and not (folder / files.CONSOLE).exists()
    assert marked(LATE) == []


def test_a_host_that_is_given_up_while_it_comes_up_ends_its_machine(make: Make, tmp_path: Path) -> None:
    driver, folder = given_up(make, tmp_path)
    host = start_host(folder)
    wait_for((folder / files.RUNNING).exists)
    assert marked(LATE)
    files.record_end(folder, "host-failed", driver.clock.now())
    assert host.wait(30) == 0
    assert marked(LATE) == []
    assert [machine.reason for machine in driver.machines({}) if machine.id == LATE] == ["host-failed"]


def test_whoever_gives_a_host_up_ends_it(make: Make, tmp_path: Path) -> None:
    driver, folder = given_up(make, tmp_path)
    slow = start_host(folder, ("-c", "import time; time.sleep(300)"))
    wait_for(lambda: marked(LATE, files.HOST_MARK))
    assert [machine.state for machine in driver.machines({}) if machine.id == LATE] == ["terminated"]
    assert slow.wait(30) == -signal.SIGKILL


def test_an_end_is_not_recorded_while_processes_are_left(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = make()
    machine = driver.launch(request("run-1"))
    host = files.read_json(tmp_path / "cloud" / "machines" / machine.id / files.RUNNING)
    assert host
    os.kill(host["pid"], signal.SIGKILL)
    wait_for(lambda: not lives(host))
    monkeypatch.setattr(processes, "TRIES_SECONDS", 0.0)  # they could not be ended in the time there was
    assert described(driver, machine).state == "running"
    assert marked(machine.id)
    monkeypatch.undo()
    assert described(driver, machine).reason == "host-failed"
    assert marked(machine.id) == []


# -- time and money ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pool", "notice_seconds"), [(AWS_POOL, 120), (GCP_POOL, 30)], ids=["AWS", "GCP"])
def test_a_notice_lasts_as_long_as_the_cloud_s_does_by_the_cloud_s_clock(
    make: Make, pool: CapacityPool, notice_seconds: int
) -> None:
    driver = make(Fate(after_seconds=60), clock_speed=100)
    over = ended(driver, driver.launch(request("run-1", pool=pool)))
    assert over.reason == "preempted" and over.detail.endswith(f"{notice_seconds} s of notice")
    assert over.terminated_at
    lived = (over.terminated_at - over.launched_at).total_seconds()
    # Never shorter; longer by what the computer needed to see and to do it, which counts a hundredfold here.
    assert 60 + notice_seconds <= lived < 60 + notice_seconds + 400


def test_without_notice_a_machine_is_gone_at_once(make: Make) -> None:
    driver = make(Fate(after_seconds=0.1, notice=False))
    over = ended(driver, driver.launch(request("run-1")))
    assert over.terminated_at and 0.1 <= (over.terminated_at - over.launched_at).total_seconds() < 15
    assert over.detail == "the market took the machine, with no notice"


def test_every_process_that_opens_the_cloud_sees_the_same_clock(make: Make, tmp_path: Path) -> None:
    shown = in_another_process("print(driver_of(Path(sys.argv[1]), clock_speed=60).clock)", tmp_path / "cloud")
    mine = make(clock_speed=60).clock
    assert shown.communicate(timeout=60)[0].strip() == str(mine)


def test_a_clock_that_machines_live_by_is_not_changed_under_them(make: Make) -> None:
    machine = make(clock_speed=60).launch(request("run-1"))
    with pytest.raises(ConfigError, match="clock_speed is 2, but 1 machines"):
        make(clock_speed=2)
    driver = make(clock_speed=60)
    driver.terminate(machine.id, machine.pool)
    ended(driver, machine)
    assert make(clock_speed=2).clock.speed == 2


@pytest.mark.parametrize("market", [SeededMarket(seed=7), ScriptedMarket()], ids=["seeded", "scripted"])
def test_prices_cover_what_was_asked_and_are_never_above_on_demand(make: Make, market: Any) -> None:
    driver = make(market=market)
    end = START + timedelta(hours=5)
    for offer in driver.offers():
        history = driver.price_history(offer.pool, START, end)
        assert history[0].at <= START and history[-1].at <= end
        assert [point.at for point in history] == sorted({point.at for point in history})
        assert all(0 < point.usd_per_hour <= offer.on_demand_usd_per_hour for point in history)
        if offer.pool.provisioning_model == "on-demand":
            assert {point.usd_per_hour for point in history} == {offer.usd_per_hour} == {offer.on_demand_usd_per_hour}
        elif market.kind == "seeded":
            assert len({point.usd_per_hour for point in history}) > 10


def test_a_part_of_the_history_says_the_same_as_the_whole(make: Make) -> None:
    driver = make(market=SeededMarket(seed=7))
    whole = driver.price_history(AWS_POOL, START, START + timedelta(hours=5))
    part = driver.price_history(AWS_POOL, START + timedelta(hours=2, minutes=5), START + timedelta(hours=3))
    assert part == [point for point in whole if part[0].at <= point.at <= part[-1].at]


MARKET_SAYS = """
from datetime import UTC, datetime, timedelta
from holdfast.drivers.local.market import fate_of
start = datetime(2026, 11, 1, tzinfo=UTC)
market = SeededMarket(seed=int(sys.argv[2]), refusal_probability=0.5)
driver = driver_of(Path(sys.argv[1]), market=market)
print([point.usd_per_hour for point in driver.price_history(AWS_POOL, start, start + timedelta(hours=2))])
print([fate_of(market, AWS_POOL, number) for number in range(12)])
"""


def test_a_seed_gives_the_same_market_in_every_process_and_cloud(tmp_path: Path) -> None:
    asked = [("one", "7"), ("two", "7"), ("three", "8")]
    said = [in_another_process(MARKET_SAYS, tmp_path / name, seed).communicate(timeout=60)[0] for name, seed in asked]
    assert said[0] == said[1]
    assert "refuse=True" in said[0] and "refuse=False" in said[0]
    assert said[2].splitlines()[0] != said[0].splitlines()[0] and said[2].splitlines()[1] != said[0].splitlines()[1]


def test_a_cloud_whose_folder_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="account: the local cloud's folder"):
        driver_of(tmp_path / "file" / "cloud")
