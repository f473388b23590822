"""What fedllm adds inside FLARE's server process: runs are kept going, revoked parties refused, users answered.

FLARE ends a job when one of its processes dies, and brings back neither a job after a restart nor a
site that returns into a job. So a job is only an attempt. Twice a second the hub looks at every run
that is wanted and makes a new attempt when none is at work; the run's loop goes on from its last
checkpoint, and finished work is answered by the sites from record.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey, RunProcessKey, SystemComponents
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import RunStatus
from nvflare.fuel.hci.conn import Connection
from nvflare.fuel.hci.reg import CommandModule, CommandModuleSpec, CommandSpec
from nvflare.fuel.hci.server.constants import ConnProps
from nvflare.private.fed.server.cred_keeper import CredKeeper

from fedllm.federation import notes
from fedllm.federation.kits import ADMIN_ROLE, SERVER_ROLE
from fedllm.federation.members import of, revoked
from fedllm.federation.server import attempts, commands, tls
from fedllm.federation.server.attempts import Attempt, Seen
from fedllm.runtime.flare import FOLDER, job

TICK = 0.5
COMMAND = "fedllm"
PENDING = {RunStatus.SUBMITTED.value, RunStatus.APPROVED.value, RunStatus.DISPATCHED.value}

log = logging.getLogger("fedllm.hub")


class Hub(FLComponent):
    """The component; FLARE builds it from the server's own resources, never from a job."""

    def __init__(self) -> None:
        super().__init__()
        # FLARE builds its components before it listens.
        tls.install()
        self.folder = Path(os.environ[FOLDER])
        self.attempts: dict[str, Attempt] = {}
        self.told: dict[str, dict[str, Any]] = {}
        self.since: dict[str, tuple[str, float]] = {}
        self.over = threading.Event()

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Take part in the server's start and end."""
        if event_type == EventType.SYSTEM_BOOTSTRAP:
            server = fl_ctx.get_prop(FLContextKey.SITE_OBJ)
            server.cmd_modules.append(Window(self.folder))
            server.client_manager.cred_keeper = Keeper(self.folder)
        elif event_type == EventType.SYSTEM_START:
            threading.Thread(target=self.watch, args=(fl_ctx.get_engine(),), daemon=True).start()
        elif event_type == EventType.SYSTEM_END:
            self.over.set()

    def watch(self, engine: Any) -> None:
        """Look at everything again and again; what goes wrong in one look is logged and tried again."""
        clean = False
        while not self.over.wait(TICK):
            try:
                with engine.new_context() as fl_ctx:
                    if not clean:
                        # The last server's jobs are nobody's now; each run gets a new attempt.
                        self.forget(engine, fl_ctx, keep=set())
                        clean = True
                    self.tick(engine, fl_ctx)
            except Exception:  # the supervisor must outlive whatever a look meets
                log.exception("a look at the runs failed")
                self.over.wait(5)

    def tick(self, engine: Any, fl_ctx: FLContext) -> None:
        """Refuse the revoked, note who is connected, and look at every run."""
        table = revoked(self.folder)
        refused = set(table["names"])
        tls.drop(table["serials"])
        manager = engine.server.client_manager
        for name in of(self.folder).sites:
            if (name in refused) != manager.is_client_disabled(name):
                log.warning("site %s is %s", name, "revoked" if name in refused else "let in again")
                (manager.disable_client if name in refused else manager.enable_client)(name)
        connected = self.connected(engine)
        for name in commands.run_names(self.folder):
            self.look(engine, fl_ctx, self.folder / "runs" / name, connected, refused)
        self.forget(engine, fl_ctx, keep={each.job for each in self.attempts.values()})

    def connected(self, engine: Any) -> dict[str, tuple[str, float]]:
        """Return who is connected: site -> (token, seconds since it registered); a token is of one registration."""
        # A clock that is set while runs are at work must not make them wait: only FLARE's own times are of that clock.
        now, today, agents = time.monotonic(), time.time(), engine.server.cell.core_cell.agents
        # A process that died has closed its connection; a machine that did has only fallen silent.
        alive = {
            client.name: client.token
            for client in engine.get_clients()
            if client.get_fqcn() in agents and today - client.last_connect_time < attempts.SILENT
        }
        since = {
            name: self.since[name] if self.since.get(name, ("", 0))[0] == token else (token, now)
            for name, token in alive.items()
        }
        if since != self.since:
            notes.put(self.folder / "connected.json", {"sites": sorted(since)})
        self.since = since
        return {name: (token, now - at) for name, (token, at) in since.items()}

    def look(
        self, engine: Any, fl_ctx: FLContext, run: Path, connected: dict[str, tuple[str, float]], refused: set[str]
    ) -> None:
        """Look at one run, and do the one thing that it needs now."""
        before = self.attempts.get(run.name) or attempts.first(run)
        seen = self.see(engine, fl_ctx, run, before, connected, refused)
        after, do = attempts.decide(before, seen)
        if do == "abort":
            log.warning("run %s: attempt %d ends: %s", run.name, after.number, after.reason)
            self.abort(engine, fl_ctx, after.job)
        elif do == "submit":
            sites = [site for site in seen.wanted_sites if site in connected]
            after = after._replace(job=self.submit(engine, fl_ctx, run.name, str(after.number), sites))
            log.info("run %s: attempt %d with %s is job %s", run.name, after.number, ", ".join(sites), after.job)
        self.attempts[run.name] = after
        # Where the disk is full this is tried again in every look, and what was done is not done twice.
        if attempts.told(after) != self.told.get(run.name):
            notes.put(run / "engine.json", attempts.told(after))
            self.told[run.name] = attempts.told(after)

    def see(
        self,
        engine: Any,
        fl_ctx: FLContext,
        run: Path,
        attempt: Attempt,
        connected: dict[str, tuple[str, float]],
        refused: set[str],
    ) -> Seen:
        """Gather all that the next step depends on."""
        wish, live, end = (notes.get(run / f"{name}.json") for name in ("run", "live", "ended"))
        process = engine.run_processes.get(attempt.job) if attempt.job else None
        status = self.status(engine, fl_ctx, attempt.job) if attempt.job and not process else ""
        sites = [site for site in wish.get("sites", []) if site not in refused]
        tokens = set((process or {}).get(RunProcessKey.PARTICIPANTS) or {})
        left_out = [
            site
            for site in sites
            if process
            and site in connected
            and connected[site][0] not in tokens
            and connected[site][1] > attempts.STEADY
        ]
        names = {client.name for client in ((process or {}).get(RunProcessKey.PARTICIPANTS) or {}).values()}
        return Seen(
            now=time.monotonic(),
            wanted=str(wish.get("wanted", "stop")),
            asked=int(wish.get("asked", 0)),
            patience=float(wish.get("patience", commands.PATIENCE)),
            wanted_sites=sites,
            missing=[site for site in sites if site not in connected],
            left_out=left_out,
            refused=sorted(names & refused),
            working=process is not None,
            pending=status in PENDING,
            status=status,
            round=int(live.get("round", 0)),
            end=end if str(end.get("attempt")) == str(attempt.number) else {},
        )

    def status(self, engine: Any, fl_ctx: FLContext, job_id: str) -> str:
        """Return what FLARE says of a job."""
        found = engine.get_component(SystemComponents.JOB_MANAGER).get_job(job_id, fl_ctx)
        return str(found.meta.get("status", "")) if found else ""

    def submit(self, engine: Any, fl_ctx: FLContext, run: str, attempt: str, sites: list[str]) -> str:
        """Make a job of one attempt at a run."""
        meta, content = job(run, attempt, sites)
        job_id = str(uuid.uuid4())
        meta |= {
            "job_id": job_id,
            "submitter_name": of(self.folder).admin,
            "submitter_org": "",
            "submitter_role": SERVER_ROLE,
        }
        engine.get_component(SystemComponents.JOB_MANAGER).create(meta, content, fl_ctx)
        return job_id

    def abort(self, engine: Any, fl_ctx: FLContext, job_id: str) -> None:
        """End a job; one that was never started is told to be over."""
        engine.job_runner.stop_run(job_id, fl_ctx)
        if job_id not in engine.run_processes:
            manager = engine.get_component(SystemComponents.JOB_MANAGER)
            manager.set_status(job_id, RunStatus.FINISHED_ABORTED, fl_ctx)

    def forget(self, engine: Any, fl_ctx: FLContext, keep: set[str]) -> None:
        """Delete the jobs that nobody works on any more, with what FLARE keeps of them."""
        manager = engine.get_component(SystemComponents.JOB_MANAGER)
        for path in (self.folder / "jobs").iterdir():
            if path.name in keep or path.name in engine.run_processes or path.name in engine.job_runner.running_jobs:
                continue
            with suppress(Exception):  # a job that cannot be deleted now is met again in the next look
                manager.delete(path.name, fl_ctx)


class Window(CommandModule):
    """fedllm's one command in FLARE's administrator protocol: a JSON question, a JSON answer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get_spec(self) -> CommandModuleSpec:
        """Tell FLARE of the command."""
        spec = CommandSpec(COMMAND, "ask fedllm", COMMAND, self.answer, visible=False)
        return CommandModuleSpec(COMMAND, [spec])

    def answer(self, conn: Connection, args: list[str]) -> None:
        """Answer an administrator; FLARE has checked the certificate, and here its role and name are."""
        user, role = conn.get_prop(ConnProps.USER_NAME, ""), conn.get_prop(ConnProps.USER_ROLE, "")
        head = conn.get_prop(ConnProps.CMD_PROPS)
        if role != ADMIN_ROLE or user != of(self.folder).admin or user in revoked(self.folder)["names"]:
            log.warning("refused a command of %r (role %r)", user, role)
            conn.append_dict({"error": f"'{user}' may not command this federation."})
        elif not isinstance(head, dict):
            conn.append_dict({"error": "The question is not a JSON object."})
        else:
            conn.append_dict(commands.answer(self.folder, user, head))
        conn.update_meta({"status": "ok"})


class Keeper(CredKeeper):
    """FLARE's check of who registers, with a look at what was revoked first."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def get_id_verifier(self, fl_ctx: FLContext) -> Any:
        """Return FLARE's verifier behind ours."""
        verifier = super().get_id_verifier(fl_ctx)
        return Verifier(verifier, self.folder) if verifier else None


class Verifier:
    """Refuses a certificate that was revoked, by its serial number, then asks FLARE's own verifier."""

    def __init__(self, inner: Any, folder: Path) -> None:
        self.inner, self.folder = inner, folder

    def verify_common_name(self, asserted_cn: str, nonce: str, asserter_cert: Any, signature: Any, **more: Any) -> Any:
        """Verify who registers."""
        table = revoked(self.folder)
        if f"{asserter_cert.serial_number:x}" in table["serials"] or asserted_cn in table["names"]:
            log.warning("refused %r: its certificate %x was revoked", asserted_cn, asserter_cert.serial_number)
            raise ValueError("the certificate was revoked")
        return self.inner.verify_common_name(
            asserted_cn=asserted_cn, nonce=nonce, asserter_cert=asserter_cert, signature=signature, **more
        )
