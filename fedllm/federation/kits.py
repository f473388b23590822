"""The folders that FLARE's processes start from: the server's, the administrator's and a site's.

What FLARE would leave open is closed here: jobs carry no code, only classes named here may be built
from a job, nobody but the server's own component makes jobs, a site sends no logs, and jobs, snapshots
and transfers are kept where the federation is, not under /tmp.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedllm.federation.consortium import Consortium

ADMIN_ROLE = "fedllm_admin"
"""The role in the administrator's certificate; sites' certificates have none."""

SERVER_ROLE = "fedllm_server"
"""Who makes jobs: the component in the server's own process."""

CLASSES = [
    "nvflare.collab.runtime.controller.CollabController",
    "nvflare.collab.runtime.executor.CollabExecutor",
    "fedllm.runtime.flare.Lead",
    "fedllm.runtime.flare.Relay",
]
"""All that a job may build."""

LAUNCHER = "fedllm.federation.launch.Launcher"

RIGHTS = {
    "fedllm_admin": {"view": "none", "operate": "none", "submit_job": "none", "byoc": "none"},
    "fedllm_server": {"submit_job": "any", "byoc": "none"},
}
"""What FLARE's own commands allow to whom: nothing to people, whose commands are fedllm's."""

HEARTBEAT, DEAD_AFTER = 4.0, 60
"""Seconds between a site's signs of life, of 2 kB each, and after which FLARE forgets a silent site."""


def server_kit(folder: Path, consortium: Consortium) -> None:
    """Write the server's FLARE workspace into `folder / "server"`, beside what it keeps."""
    server, startup, local = consortium.server, folder / "server" / "startup", folder / "server" / "local"
    write(
        startup / "fed_server.json",
        {
            "format_version": 2,
            "require_signed_jobs": False,
            "servers": [
                {
                    "name": consortium.name,
                    "service": {"target": f"{listen(server.address)}:{server.port}", "scheme": "tcp"},
                    "admin_server": server.address,
                    "admin_port": server.port,
                    "ssl_private_key": "server.key",
                    "ssl_cert": "server.crt",
                    "ssl_root_cert": "rootCA.pem",
                    "connection_security": "mtls",
                }
            ],
        },
    )
    store = "nvflare.app_common.storages.filesystem_storage.FilesystemStorage"
    write(
        local / "resources.json",
        {
            **classes(),
            "servers": [
                {
                    "admin_storage": str(folder / "transfer"),
                    "max_num_clients": len(consortium.sites) + 10,
                    "heart_beat_timeout": DEAD_AFTER,
                    "admin_timeout": 10.0,
                }
            ],
            "snapshot_persistor": {
                "path": "nvflare.app_common.state_persistors.storage_state_persistor.StorageStatePersistor",
                "args": {
                    "uri_root": "/",
                    "storage": {"path": store, "args": {"root_dir": str(folder / "snapshots"), "uri_root": "/"}},
                },
            },
            "components": [
                part(
                    "job_scheduler",
                    "nvflare.app_common.job_schedulers.job_scheduler.DefaultJobScheduler",
                    max_jobs=16,
                    min_schedule_interval=2.0,
                    max_schedule_interval=10.0,
                ),
                part(
                    "job_manager",
                    "nvflare.apis.impl.job_def_manager.SimpleJobDefManager",
                    uri_root=str(folder / "jobs"),
                    job_store_id="job_store",
                ),
                part("job_store", store),
                part("process_launcher", LAUNCHER),
            ],
        },
    )
    # A file of this pattern is read by the server's own process only, not by its jobs.
    hub = part("fedllm_hub", "fedllm.federation.server.hub.Hub")
    write(local / "fedllm__p_resources.json", {"format_version": 2, "components": [hub]})
    common(local)


def admin_kit(kit: Path, consortium: Consortium) -> None:
    """Write what the administrator's machine needs beside its key and certificates."""
    server = consortium.server
    write(
        kit / "startup" / "fed_admin.json",
        {
            "format_version": 1,
            "admin": {
                "project_name": consortium.name,
                "username": consortium.admin,
                "server_identity": server.address,
                "scheme": "tcp",
                "host": server.address,
                "port": server.port,
                "connection_security": "mtls",
                "uid_source": "user_input",
                "upload_dir": "transfer",
                "download_dir": "transfer",
                "client_key": "client.key",
                "client_cert": "client.crt",
                "ca_cert": "rootCA.pem",
            },
        },
    )
    settings = {"idle_timeout": 3600.0, "login_timeout": 10.0, "authenticate_msg_timeout": 5.0}
    write(kit / "local" / "resources.json", {"format_version": 1, "admin": settings})


def site_kit(kit: Path, name: str, consortium: str, address: str, port: int) -> None:
    """Write what a site's FLARE process needs beside its key and certificates."""
    write(
        kit / "startup" / "fed_client.json",
        {
            "format_version": 2,
            # A signature would be the server's, which TLS has proven already.
            "require_signed_jobs": False,
            "servers": [
                {
                    "name": consortium,
                    "service": {"target": f"{address}:{port}", "scheme": "tcp"},
                    "identity": address,
                }
            ],
            "client": {
                "ssl_private_key": "client.key",
                "ssl_cert": "client.crt",
                "ssl_root_cert": "rootCA.pem",
                "fqsn": name,
                "is_leaf": True,
                "connection_security": "mtls",
            },
        },
    )
    local = kit / "local"
    write(
        local / "resources.json",
        {
            **classes(),
            "allow_log_streaming": False,
            "client": {"retry_timeout": 30, "compression": "Gzip"},
            "components": [
                part(
                    "resource_manager",
                    "nvflare.app_common.resource_managers.passthrough_resource_manager.PassthroughResourceManager",
                ),
                part(
                    "resource_consumer",
                    "nvflare.app_common.resource_consumers.passthrough_resource_consumer.PassthroughResourceConsumer",
                ),
                part("process_launcher", LAUNCHER),
                part("dialler", "fedllm.federation.dial.Dialler"),
            ],
        },
    )
    common(local)


def common(local: Path) -> None:
    """Write who may do what, and what is logged: warnings, and what FLARE itself says of starts and ends."""
    write(local / "authorization.json", {"format_version": "1.0", "permissions": RIGHTS})
    file = {
        "class": "logging.handlers.RotatingFileHandler",
        "formatter": "plain",
        "filename": "log.txt",
        "maxBytes": 10_000_000,
        "backupCount": 3,
    }
    write(
        local / "log_config.json",
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"plain": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
            "handlers": {"file": file},
            "loggers": {
                "root": {"level": "INFO", "handlers": ["file"]},
                # Says two lines of every call, of which a large message has hundreds.
                "nvflare.collab.runtime.cell_dispatcher": {"level": "WARNING"},
            },
        },
    )


def listen(address: str) -> str:
    """Return the address to listen on: all of the machine's, or loopback only where the server's is loopback."""
    return "127.0.0.1" if address == "localhost" or address.startswith("127.") else "0.0.0.0"


def classes() -> dict[str, Any]:
    """Return which classes a job may name; anything else is refused."""
    return {"format_version": 2, "class_list_enforcement_mode": "enforce", "class_allow_list": CLASSES}


def part(name: str, path: str, **arguments: Any) -> dict[str, Any]:
    """Return one component as FLARE's configuration says it."""
    return {"id": name, "path": path, "args": arguments}


def write(path: Path, content: dict[str, Any]) -> None:
    """Write one JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
