"""What keeps a daemon running: units that systemd accepts, a closed container, a chart, and an honest heartbeat."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fedllm.core.errors import FedllmError
from fedllm.federation.deploy import KINDS, Daemon, deploy
from fedllm.federation.health import STALE, beat, healthy

ODD = "a b%h$HOME'\"é"


def server(folder: Path) -> Daemon:
    home = folder / "federation"
    home.mkdir(parents=True)
    return Daemon("server", "lungs", home, home, 8002)


def site(folder: Path) -> Daemon:
    home, data = folder / "site", folder / "data"
    (home / "state").mkdir(parents=True)
    (home / "kit").mkdir()
    data.mkdir()
    (home / "site.toml").touch()
    (home / "my.jsonl").touch()
    return Daemon(
        "site", "hospital_a", home / "site.toml", home / "state", 0, [home / "kit"], [data, home / "my.jsonl"]
    )


ROLES = pytest.mark.parametrize("make", [server, site])


def one(paths: list[Path], name: str) -> str:
    return next(path for path in paths if path.name == name).read_text()


@ROLES
@pytest.mark.parametrize("place", ["plain", ODD])
def test_systemd_accepts_the_units(tmp_path, make, place):
    daemon = make(tmp_path / place)
    (unit,) = deploy(daemon, "systemd", tmp_path / "out")
    text = unit.read_text()
    assert unit.name == f"fedllm-{daemon.role}-{daemon.name}.service"
    for line in ("NoNewPrivileges=yes", "ProtectSystem=strict", "Restart=always", "KillMode=mixed", "WatchdogSec=60"):
        assert line in text.splitlines()
    assert text.count("ReadWritePaths=") == (1 if daemon.role == "server" else 2)
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("systemd-analyze is not on this machine")
    done = subprocess.run([verify, "verify", "--man=no", str(unit)], capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if unit.name in line]
    assert done.returncode == 0 and not said, done.stderr


def test_a_wrong_unit_is_not_accepted(tmp_path):
    """The check above can fail."""
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("systemd-analyze is not on this machine")
    (unit,) = deploy(server(tmp_path), "systemd", tmp_path / "out")
    unit.write_text(unit.read_text().replace("ExecStart=", "ExecStart=relative/").replace("KillMode", "KilMode"))
    done = subprocess.run([verify, "verify", "--man=no", str(unit)], capture_output=True, text=True)
    assert done.returncode != 0 or unit.name in done.stderr


@ROLES
@pytest.mark.parametrize("place", ["plain", ODD])
def test_compose_closes_the_container(tmp_path, make, place):
    daemon = make(tmp_path / place)
    paths = deploy(daemon, "compose", tmp_path / "out")
    (name, service), *more = yaml.safe_load(one(paths, "compose.yaml"))["services"].items()
    word = "federation" if daemon.role == "server" else "site"
    assert not more and name == daemon.role
    plain = json.loads(json.dumps(service).replace("$$", "$"))
    assert plain["command"] == [word, "start", str(daemon.path)]
    assert plain["healthcheck"]["test"] == ["CMD", "fedllm", word, "health", str(daemon.path)]
    assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["restart"] == "always"
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert int(service["user"].partition(":")[0]) > 0
    assert service.get("ports") == (["8002:8002"] if daemon.role == "server" else None)
    mounts = {mount["target"]: mount["read_only"] for mount in plain["volumes"]}
    assert all(mount["source"] == mount["target"] for mount in plain["volumes"])
    home = tmp_path / place
    assert mounts == (
        {str(home / "federation"): False}
        if daemon.role == "server"
        else {
            str(home / "data"): True,
            str(home / "site"): True,
            str(home / "site/kit"): False,
            str(home / "site/state"): False,
        }
    )
    docker = shutil.which("docker")
    if docker and not subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        file = next(path for path in paths if path.name == "compose.yaml")
        subprocess.run([docker, "compose", "-f", file, "config", "--quiet"], check=True)


@ROLES
@pytest.mark.parametrize("place", ["plain", ODD])
def test_the_compose_file_is_one_by_the_compose_specification(tmp_path, make, place):
    pytest.importorskip("check_jsonschema", reason="check-jsonschema, with the specification's schema, is not here")
    file = next(p for p in deploy(make(tmp_path / place), "compose", tmp_path / "out") if p.name == "compose.yaml")
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(file)]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    file.write_text(file.read_text().replace("cap_drop", "cap_drp"))
    assert "cap_drp" in subprocess.run(check, capture_output=True, text=True).stdout


@ROLES
def test_the_image_does_not_run_as_root(tmp_path, make):
    daemon = make(tmp_path)
    lines = one(deploy(daemon, "compose", tmp_path / "out"), "Dockerfile").splitlines()
    word = "federation" if daemon.role == "server" else "site"
    health = next(line for line in lines if line.startswith("HEALTHCHECK"))
    assert json.loads(health.partition("CMD ")[2]) == ["fedllm", word, "health", str(daemon.path)]
    assert "USER 10001:10001" in lines and any(re.match(r"FROM python:3\.\d+-slim$", line) for line in lines)
    assert [line for line in lines if line.startswith("EXPOSE")] == ["EXPOSE 8002"] * (daemon.role == "server")


def rendered(chart: Path, *options: str) -> dict[str, dict]:
    """The chart's objects, by `helm` (with options) where it is here, else with its few actions filled in by hand."""
    values = yaml.safe_load((chart / "values.yaml").read_text())
    helm = shutil.which("helm")
    if helm is not None:
        subprocess.run([helm, "lint", "--strict", str(chart)], check=True)
        template = [helm, "template", "it", str(chart), *options]
        done = subprocess.run(template, check=True, capture_output=True, text=True)
        return {found["kind"]: found for found in yaml.safe_load_all(done.stdout) if found}

    def fill(match: re.Match[str]) -> str:
        if "printf" in match[0]:
            return '"image:tag"'
        found: object = {"Values": values, "Release": {"Name": "it", "Namespace": "default"}}
        for key in re.search(r"\.([\w.]+)", match[0])[1].split("."):
            found = found[key]
        return json.dumps(found) if "toJson" in match[0] or "quote" in match[0] else str(found)

    texts = [path.read_text() for path in sorted((chart / "templates").glob("*.yaml"))]
    texts = [re.sub(r"(?m)^ *\{\{- (if .*|end) \}\}\n", "", text) for text in texts]
    texts = [re.sub(r"\{\{.*?\}\}", fill, text) for text in texts]
    return {found["kind"]: found for found in map(yaml.safe_load, texts)}


@ROLES
def test_the_chart_is_closed_too(tmp_path, make):
    daemon = make(tmp_path)
    deploy(daemon, "helm", tmp_path / "out")
    chart = tmp_path / "out" / f"fedllm-{daemon.role}"
    assert yaml.safe_load((chart / "Chart.yaml").read_text())["apiVersion"] == "v2"
    found = rendered(chart)
    is_server = daemon.role == "server"
    assert found.keys() == {"StatefulSet", "NetworkPolicy"} | ({"Service"} if is_server else set())
    pod = found["StatefulSet"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    path = "/federation" if is_server else "/site/site.toml"
    word = "federation" if is_server else "site"
    assert container["args"] == [word, "start", path]
    for probe in ("startupProbe", "livenessProbe"):
        assert container[probe]["exec"]["command"] == ["fedllm", word, "health", path]
    assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
    for each in (container, *pod["initContainers"]):
        assert each["securityContext"]["readOnlyRootFilesystem"]
        assert not each["securityContext"]["allowPrivilegeEscalation"]
        assert each["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert found["StatefulSet"]["spec"]["volumeClaimTemplates"][0]["spec"]["resources"]["requests"]["storage"]
    ingress = found["NetworkPolicy"]["spec"]["ingress"]
    assert ingress == ([{"ports": [{"protocol": "TCP", "port": 8002}]}] if is_server else [])
    assert ("ports" in container) == is_server


@ROLES
@pytest.mark.parametrize("options", [(), ("--set", "persistence.storageClass=fast,data.existingClaim=text")])
def test_kubernetes_knows_each_key_of_the_charts_objects(tmp_path, make, options):
    kubernetes = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate, with the schemas, is not here")
    daemon, version = make(tmp_path), kubernetes.latest_version()
    deploy(daemon, "helm", tmp_path / "out")
    found = rendered(tmp_path / "out" / f"fedllm-{daemon.role}", *options)
    for each in found.values():
        kubernetes.validate(each, version, strict=True)
    found["StatefulSet"]["spec"]["template"]["spec"]["runAsNonRoot"] = True
    with pytest.raises(kubernetes.ValidationError, match="runAsNonRoot"):
        kubernetes.validate(found["StatefulSet"], version, strict=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_files_are_written_again_but_edited_ones_are_kept(tmp_path, kind):
    daemon = server(tmp_path)
    paths = deploy(daemon, kind, tmp_path / "out")
    assert deploy(daemon, kind, tmp_path / "out") == paths
    paths[0].write_text("mine")
    with pytest.raises(FedllmError, match="is there already and differs"):
        deploy(daemon, kind, tmp_path / "out")
    assert paths[0].read_text() == "mine"


def test_what_cannot_be_kept_running_is_named(tmp_path):
    daemon = server(tmp_path)
    for wrong, says in [
        (daemon._replace(name="a/../b"), "cannot name a service"),
        (daemon._replace(name="a\nUser=root"), "cannot name a service"),
        (daemon._replace(port=0), "port is 0"),
        (daemon._replace(state=tmp_path / "none"), "none does not exist"),
    ]:
        with pytest.raises(FedllmError, match=says):
            deploy(wrong, "systemd", tmp_path / "out")
    (tmp_path / "x\nUser=root").mkdir()
    with pytest.raises(FedllmError, match="unprintable"):
        deploy(daemon._replace(state=tmp_path / "x\nUser=root"), "systemd", tmp_path / "out")
    with pytest.raises(FedllmError, match="did you mean 'systemd'"):
        deploy(daemon, "sytemd", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_daemon_is_healthy_while_it_beats(tmp_path):
    assert "has not started" in healthy(tmp_path)
    beat(tmp_path)
    assert healthy(tmp_path) is None
    for age in (STALE + 1, -STALE - 1):
        os.utime(tmp_path / "heartbeat", (0, time.time() - age))
        assert "dead or stuck" in healthy(tmp_path)
    beat(tmp_path)
    assert healthy(tmp_path) is None
    with pytest.raises(FedllmError, match="cannot show that it lives"):
        beat(tmp_path / "none")


@pytest.mark.parametrize("abstract", [False, True])
def test_a_beat_feeds_the_watchdog_of_systemd(tmp_path, monkeypatch, abstract):
    name = f"@fedllm-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + name[1:] if abstract else name)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        beat(tmp_path)
        assert listener.recv(100) == b"WATCHDOG=1"
