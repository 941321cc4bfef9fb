"""Hosts a reward on Ray Serve, for the protocol of docs/remote-rewards.md.

    POST /NAME ─▶ Serve's proxy ─▶ replica: token, size, images ─▶ batches of several calls ─▶ the reward, in one thread

Serve starts more replicas when calls queue, and answers 503 when too many wait. If the reward raises an error, it gets
each call alone, and a call that fails again in halves, until the images that do it are found: they have no score. Where
none has one, the call is answered 500; the replica lives on. One whose reward is broken, or hangs for longer than
`deadline_s`, is replaced.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import hmac
import logging
import re
import socket
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import ray
from ray import serve
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.context import _get_global_client
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from actors.experience.journal.origin import hash_of, scorer_hash
from actors.experience.scoring.pool_parts import first_line, raised_at
from actors.experience.scoring.start_check import check_requests
from deepgen.cluster.own_environment import OwnEnvironment, own_environment
from deepgen.cluster.resources import Placement, pool_placement
from deepgen.config import PoolSettings
from deepgen.config.schema.sections import TASKS, ClusterSettings
from deepgen.errors import UserError
from deepgen.monitoring.log_lines import Speaker, set_up_logs
from rewards import Missing, RewardBroken, RewardRequest, RewardUnavailable, Score, applies, build_reward
from rewards.remote.protocol import MAX_BODY, ProtocolError, one_line, read_question, write_answer

log = logging.getLogger(__name__)

CALLS = 8  # that a replica works on at once, and at most scores together
WAIT_S = 0.01  # for other calls to score together with
QUEUE = 64  # calls for a reward that wait at the proxy, beyond which Serve answers 503
BODY_S = 30.0  # for a body to arrive
POLL_S = 0.2
STOP_S = 30.0  # for replicas to finish their calls
QUIET = {"log_level": "WARNING", "enable_access_log": False}
BUGS = 3  # images of a call with which the reward fails, without a score in between: then all of the call fails
_NOT_NOW = (RewardUnavailable, RewardBroken)  # another attempt may be answered, by this replica or by another
_ERROR = re.compile(r"^\s*(?:[\w.]+\.)?(\w*(?:Error|Exception)\w*(?:\(\w+\))?): (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Hosting:
    """How rewards are served. token: what callers have to send; "" for none. most: replicas of each, when busy."""

    host: str
    port: int
    token: str = field(repr=False)
    most: int


class RewardService:
    """A replica of one reward.

    token_hash: SHA-256 of the token, so that Ray's state never holds the token itself. own: the reward's environment.
    """

    def __init__(self, pool: PoolSettings, token_hash: str, own: OwnEnvironment | None = None) -> None:
        if own and not own.is_here():
            raise RuntimeError(f"{own.key}: this node has joined later and has no {own.folder}")
        set_up_logs(Speaker("reward service", pool.pool_name))
        self._pool, self._token_hash, self._scorer = pool, token_hash, scorer_hash(pool)
        self._since: float | None = None  # when the reward got the batch that it is scoring
        self._raised = set[tuple[str, str]]()  # kinds of exceptions that are on the log
        self._broken = ""  # why the reward scores nothing any more
        # Rewards are not made for calls beside each other, and some libraries want one thread for all.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reward")
        self._reward = self._thread.submit(build_reward, pool).result()
        if first := check_requests(pool, TASKS):  # of a task that it scores: rewards of edits need a source
            self._thread.submit(self._reward.score, first).result()  # a first call takes longer

    def check_health(self) -> None:
        """Raise RuntimeError if the reward hangs or is broken. Serve asks now and then, and replaces it."""
        if self._broken:
            raise RuntimeError(f"{self._pool.pool_name}: {self._broken}")
        age = 0.0 if (since := self._since) is None else time.monotonic() - since
        if age > self._pool.deadline_s:
            raise RuntimeError(f"{self._pool.pool_name}: a batch has taken {age:.0f} s (deadline_s)")

    async def __call__(self, request: Request) -> Response:
        if not self._may(request.headers.get("authorization", "")):
            return _says(401, "the token is missing or wrong; allowed: Authorization: Bearer TOKEN")
        if request.method != "POST":
            return _says(405, "allowed: POST")
        try:
            body = await asyncio.wait_for(_body(request), BODY_S)
        except TimeoutError:
            return _says(408, f"the body did not arrive within {BODY_S:g} s")
        if body is None:
            return _says(413, f"allowed: a body of at most {MAX_BODY:,} bytes")
        try:
            read = await asyncio.to_thread(read_question, body)
        except ProtocolError as error:
            return _says(400, str(error))
        try:
            return Response(write_answer(await self._scores(read), self._version()), media_type="application/json")
        except _NOT_NOW as error:
            return _says(503, str(error) or "the reward is unavailable")
        except Exception as error:  # the process boundary: the reward's bug must not end the service
            log.exception("reward %s", self._pool.pool_name)
            return _says(500, self._failed(error))

    def _version(self) -> str:
        """What decides the scores, as one text; "" if the reward asks a service that does not say."""
        served: str | None = getattr(self._reward, "version", None)
        return "" if served == "" else hash_of(self._scorer, served)

    async def _scores(self, read: Sequence[RewardRequest | Missing]) -> list[Score]:
        """The reward's scores of what could be read and it applies to."""
        scores: list[Score] = [None] * len(read)
        asked: dict[int, RewardRequest] = {}
        for index, one in enumerate(read):
            if isinstance(one, Missing):
                scores[index] = one
            elif applies(self._pool, one):
                asked[index] = one
            else:
                scores[index] = Missing("refused", "the reward does not apply to this prompt")
        if asked:
            given = await self._together(list(asked.values()))
            if isinstance(given, Exception):
                raise given
            for index, score in zip(asked, given, strict=True):
                scores[index] = score
        return scores

    @serve.batch(max_batch_size=CALLS, batch_wait_timeout_s=WAIT_S)
    async def _together(self, calls: list[list[RewardRequest]]) -> list[list[Score] | Exception]:
        """The scores of the requests of each call, or why there are none. A call with a fault costs no other one."""
        found = await self._attempt([one for call in calls for one in call])
        if isinstance(found, _NOT_NOW):
            return [found] * len(calls)
        if isinstance(found, Exception):
            return [await self._apart(call, found if len(calls) == 1 else None) for call in calls]
        scores = iter(found)
        return [list(islice(scores, len(call))) for call in calls]

    async def _apart(self, call: list[RewardRequest], met: Exception | None) -> list[Score] | Exception:
        """The scores of one call. If the reward fails, halves are tried, down to the requests with which it does.

        met: the error of the whole call, if it has been tried. Returns an error if there is no score at all.
        """
        scores: dict[int, Score] = {}
        left, failed, worked = [range(len(call))], 0, False
        while left:
            part = left.pop()
            found, met = met or await self._attempt([call[index] for index in part]), None
            if isinstance(found, _NOT_NOW):
                return found
            if not isinstance(found, Exception):
                scores |= zip(part, found, strict=True)
                worked = True
            elif len(part) > 1:
                middle = len(part) // 2
                left += [part[middle:], part[:middle]]
            else:
                failed += 1
                scores[part[0]] = Missing("refused", self._failed(found))
            if not worked and (failed == BUGS or (failed and not left)):
                assert isinstance(found, Exception)
                return found
        return [scores[index] for index in range(len(call))]

    def _failed(self, error: Exception) -> str:
        return f"{self._pool.class_} failed: {type(error).__name__}: {error}"

    async def _attempt(self, requests: list[RewardRequest]) -> list[Score] | Exception:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._score, requests)
        except RewardBroken as error:
            log.exception("reward %s is broken; its replica is replaced", self._pool.pool_name)
            self._broken = str(error) or "broken"
            return error
        except Exception as error:  # noqa: BLE001  raised again by the calls that it concerns
            kind, where = type(error).__name__, raised_at("".join(traceback.format_exception(error)))
            if (kind, where) not in self._raised:  # in halves it may go away, and then nobody raises it
                self._raised.add((kind, where))
                name, said = self._pool.pool_name, first_line(error)
                log.warning("%s: raised %s for %d images: %s%s", name, kind, len(requests), said, where)
            return error

    def _score(self, requests: list[RewardRequest]) -> list[Score]:
        """The reward's scores, in batches of the pool's size."""
        scores, size = list[Score](), self._pool.batch_size
        for start in range(0, len(requests), size):
            batch = requests[start : start + size]
            self._since = time.monotonic()
            try:
                found = self._reward.score(batch)
            finally:
                self._since = None
            if len(found) != len(batch):
                raise ValueError(f"{len(found)} scores for {len(batch)} requests")
            scores += found
        return scores

    def _may(self, given: str) -> bool:
        if not self._token_hash:
            return True
        kind, _, token = given.partition(" ")
        return kind.lower() == "bearer" and hmac.compare_digest(digest(token.strip()), self._token_hash)


async def _body(request: Request) -> bytes | None:
    """The body; None if it is too large, which is known before all of it is here."""
    told = request.headers.get("content-length", "")
    if told.isascii() and told.isdecimal() and int(told[:20]) > MAX_BODY:
        return None
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY:
            return None
    return bytes(body)


def _says(status: int, text: str) -> Response:
    return PlainTextResponse(one_line(text), status)


def digest(token: str) -> str:
    """SHA-256 of a token, or "" of none."""
    return hashlib.sha256(token.encode()).hexdigest() if token else ""


# ---- from the program's side ----


def start_services(
    pools: Sequence[PoolSettings], hosting: Hosting, cluster: ClusterSettings, *, gpus: bool
) -> dict[str, str]:
    """Serve each pool's reward. Returns its address by name, once all of them can score.

    Raises UserError for a reward that compares images, if the port is taken, if Ray Serve already runs on the cluster,
    if a reward does not start, or if they are not there within `cluster.start_deadline_s`; then nothing that it began
    is left.
    """
    targets = [
        serve.RunTarget(
            reward_application(pool, hosting, pool_placement(cluster, pool, gpus=gpus)),
            pool.pool_name,
            f"/{pool.pool_name}",
            QUIET,
        )
        for pool in pools
    ]
    deadline_s = cluster.start_deadline_s
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if serve.status().proxies or serve.status().applications:
        raise UserError(
            "--address: Ray Serve already runs on that cluster, with an address of its own; allowed: another"
        )
    _require_free(hosting)
    make_environments(pools, deadline_s)
    longest = max(pool.deadline_s for pool in pools)
    http = HTTPOptions(host=hosting.host, port=hosting.port, request_timeout_s=longest)
    # Its controller warns of every delay of a busy machine. What keeps a reward from starting, `_wait` tells, and
    # `faults` later.
    alarms = QUIET | {"log_level": "CRITICAL"}
    try:
        serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=http, logging_config=alarms)
        serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        _wait([pool.pool_name for pool in pools], deadline_s)
    except BaseException:
        stop_services()
        raise
    host = f"[{hosting.host}]" if ":" in hosting.host else hosting.host
    return {pool.pool_name: f"http://{host}:{hosting.port}/{pool.pool_name}" for pool in pools}


def stop_services() -> None:
    """End what `start_services` has started. On a cluster that nobody reaches any more there is nothing to end."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is not None:
        # The controller ends in this call. `serve.shutdown` makes it so that Ray would try it again, and Ray says so.
        ending = client._controller.graceful_shutdown.options(max_task_retries=0).remote()
        with suppress(RayActorError, GetTimeoutError):
            ray.get(ending, timeout=STOP_S)
    serve.shutdown()


def faults() -> dict[str, str]:
    """Rewards that do not score now, and why."""
    found = serve.status().applications
    return {name: f"{one.status.value.lower()}: {_why(one)}" for name, one in found.items() if one.status != "RUNNING"}


def make_environments(pools: Sequence[PoolSettings], deadline_s: float) -> None:
    """Make the rewards' own environments on every node, as Serve may place a replica on any. Raises UserError."""
    make = ray.remote(_make_environment)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    made = [
        make.options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            own, deadline_s
        )
        for own in map(own_environment, pools)
        if own
        for node in nodes
    ]
    try:
        ray.get(made, timeout=deadline_s + BODY_S)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    except GetTimeoutError as error:
        raise UserError(f"rewards.*.environment: not made on {len(nodes)} nodes within {deadline_s:g} s") from error


def _make_environment(own: OwnEnvironment, deadline_s: float) -> None:
    own.make(deadline_s)


def reward_application(pool: PoolSettings, hosting: Hosting, placement: Placement) -> Any:
    """The Serve application that hosts a pool's reward. Raises UserError for a reward that compares images."""
    if hasattr(pool.reward_class(), "score_groups"):
        raise UserError(f"rewards.{pool.pool_name}: compares images of a prompt; allowed: rewards that score each")
    own = own_environment(pool)
    runtime = {"runtime_env": {**ray.get_runtime_context().runtime_env, **own.runtime_env()}} if own else {}
    deployment = serve.deployment(
        RewardService,
        name=pool.pool_name,
        ray_actor_options={**placement.options(), **runtime},
        max_ongoing_requests=CALLS,
        max_queued_requests=QUEUE,
        max_constructor_retry_count=1,
        autoscaling_config={
            "min_replicas": pool.least_replicas,
            "max_replicas": max(pool.most_replicas, hosting.most),
            "target_ongoing_requests": CALLS / 2,
        },
    )
    return deployment.bind(pool, digest(hosting.token), own)


def _require_free(hosting: Hosting) -> None:
    host, port = hosting.host, hosting.port
    try:
        socket.getaddrinfo(host, port, _family(host))
    except (OSError, UnicodeError) as error:  # UnicodeError: a name with a part of more than 63 letters
        raise UserError(f"--host: got {host!r}: {error}; allowed: an address of this machine") from error
    try:
        with socket.create_server((host, port), family=_family(host)):
            pass
    except OSError as error:
        key = "--host" if error.errno == errno.EADDRNOTAVAIL else "--port"
        raise UserError(
            f"{key}: cannot listen on {host}, port {port}: {error.strerror or error}; allowed: "
            "another --port, or an address of this machine as --host"
        ) from error


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _wait(names: Sequence[str], deadline_s: float) -> None:
    end = time.monotonic() + deadline_s
    while True:
        found = serve.status().applications
        for name in names:
            if name in found and found[name].status in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise UserError(f"rewards.{name}: cannot be served: {_why(found[name])}", _trace(found[name]))
        waiting = [name for name in names if name not in found or found[name].status != "RUNNING"]
        if not waiting:
            return
        if time.monotonic() > end:
            raise UserError(
                f"rewards.{waiting[0]}: not there after {deadline_s:g} s (cluster.start_deadline_s)"
                + (f": {_why(found[waiting[0]])}" if waiting[0] in found else "")
            )
        time.sleep(POLL_S)


def _texts(application: Any) -> list[str]:
    return [application.message, *(deployment.message for deployment in application.deployments.values())]


def _trace(application: Any) -> str:
    """The traceback of the reward's error that Serve tells of; "" for none, and for a UserError, which needs none."""
    for text in _texts(application):
        if errors := _ERROR.findall(text):
            return "" if errors[-1][0].startswith("UserError") else text
    return ""


def _why(application: Any) -> str:
    """What Serve says of an application in one line: the error that the reward raised, if there is one."""
    texts = _texts(application)
    for text in texts:
        if errors := _ERROR.findall(text):
            kind, said = errors[-1]
            return one_line(said if kind.startswith("UserError") else f"{kind}: {said}")
    return one_line(" ".join(texts)) or "no reason given"
