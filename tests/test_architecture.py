"""The layers and the conventions of the package, proved on its source."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import nodepass_gevent

PACKAGE = Path(nodepass_gevent.__file__).parent
LAYERS = (  # imports point downward only; modules of one layer never import each other
    {"__init__", "alarm", "arrivals", "deadlines", "errors", "files", "state"},
    {
        "callers",
        "certificates",
        "crew",
        "frames",
        "log_forms",
        "log_limit",
        "metrics",
        "pipes",
        "proxy_protocol",
        "tunnel_key",
        "usage",
        "values",
        "wire",
    },
    {"config", "log_writer"},
    {"log"},
    {"configfile", "descriptors", "keyring", "opening", "penalties", "ports", "settings", "transport", "url"},
    {"command_line", "dials", "example", "idle", "launching", "net", "notify", "relay", "udp_relay", "unframed"},
    {"accepting", "access", "carrying", "handover", "options", "status_client", "target", "udp", "verification"},
    {"datagrams", "datagrams_egress", "generate", "tls_context"},
    {"tls"},
    {"admission", "authentication", "dialing", "dialing_pool", "egress", "ingress", "pool"},
    {"hearing", "ripening", "session"},
    {"clients"},
    {"joining"},
    {"public_port", "reception"},
    {"client", "server", "service", "status_words"},
    {"status", "tunnels"},
    {"exposition"},
    {"status_answers"},
    {"status_server"},
    {"check", "process"},
    {"cli"},
    {"__main__"},
)
LAYER_OF = {module: number for number, modules in enumerate(LAYERS) for module in modules}
SANS_IO = {
    "config", "errors", "frames", "metrics", "opening", "proxy_protocol", "tunnel_key", "url", "values",
    "wire",
}  # fmt: skip
KNOW_WATCHERS = {  # may use the loop
    "accepting", "alarm", "arrivals", "deadlines", "net", "relay", "ripening", "transport", "udp", "udp_relay",
}  # fmt: skip
CATCH_ALL = {  # what is told to a greenlet; ends of exchanges, loop, requests
    "arrivals": 1, "relay": 1, "service": 1, "status_answers": 1, "status_server": 1, "udp_relay": 1,
}  # fmt: skip
MAX_FUNCTION, MAX_MODULE = 60, 400  # lines


def parse(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text())


MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))
TREES = {module: parse(module) for module in MODULES}


def imports_of_ours(tree: ast.Module) -> set[str]:
    """Name the modules of this package that a module imports, wherever the statement stands."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {name if name in MODULES else "__init__" for name in names}
    return found


def foreign_imports(tree: ast.Module) -> set[str]:
    """Name the top-level packages that a module imports from elsewhere."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def handlers(tree: ast.Module) -> Iterator[ast.ExceptHandler]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler))


def caught(handler: ast.ExceptHandler) -> set[str]:
    nodes = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return {ast.unparse(node) for node in nodes if node}


def run_python(code: str, *arguments: str) -> str:
    """Run code in a fresh, unpatched interpreter; give what it printed."""
    argv = [sys.executable, "-W", "error", "-c", code, *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_has_its_place_in_the_table():
    assert MODULES == sorted(LAYER_OF)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    wrong = {other for other in imports_of_ours(TREES[module]) if LAYER_OF[other] >= LAYER_OF[module]}
    assert not wrong, f"{module} (layer {LAYER_OF[module]}) imports {wrong}"


def test_the_picture_of_the_modules_is_in_the_order_of_their_imports():
    picture = (PACKAGE.parent / "docs/internals.rst").read_text().partition("    __main__ ")
    rows = "".join(picture[1:]).partition("\n\n")[0].splitlines()
    names = [re.findall(r"(?:^ {4}|;  )(\w+(?: \w+)*)(?:: |  )", row) for row in rows]  # first, or before a colon
    row_of = {word: number for number, row in enumerate(names) for name in row for word in name.split()}
    assert sorted(row_of.keys() & set(MODULES)) == [module for module in MODULES if module != "__init__"]
    for module in row_of.keys() & set(MODULES):
        wrong = {other for other in imports_of_ours(TREES[module]) - {"__init__"} if row_of[other] < row_of[module]}
        assert not wrong, f"{module} imports {wrong}"


@pytest.mark.parametrize("module", MODULES)
def test_ours_is_imported_by_relative_name_and_without_a_star(module):
    assert "nodepass_gevent" not in foreign_imports(TREES[module])
    assert not [
        node for node in ast.walk(TREES[module]) if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"
    ]


@pytest.mark.parametrize("module", MODULES)
def test_no_import_stands_in_a_function(module):
    functions = [node for node in ast.walk(TREES[module]) if isinstance(node, (ast.FunctionDef, ast.Lambda))]
    inside = [node for function in functions for node in ast.walk(function)]
    assert not [node.lineno for node in inside if isinstance(node, (ast.Import, ast.ImportFrom))]


def test_modules_without_io_load_neither_sockets_nor_gevent():
    code = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module("nodepass_gevent." + name)
    print(name, *{"socket", "_socket", "gevent", "OpenSSL"} & set(sys.modules))
"""
    assert set(run_python(code, *sorted(SANS_IO)).splitlines()) == SANS_IO


@pytest.mark.parametrize("module", sorted(SANS_IO))
def test_modules_without_io_import_neither_sockets_nor_gevent(module):
    assert not foreign_imports(TREES[module]) & {"socket", "select", "ssl", "gevent", "OpenSSL", "time", "os"}


@pytest.mark.parametrize("module", sorted(set(MODULES) - KNOW_WATCHERS))
def test_only_the_lower_layers_wait_on_descriptors(module):
    names = {node.id for node in ast.walk(TREES[module]) if isinstance(node, ast.Name)}
    attributes = {node.attr for node in ast.walk(TREES[module]) if isinstance(node, ast.Attribute)}
    assert not (names | attributes) & {"wait_read", "wait_write", "loop", "io"}


def test_openssl_is_called_by_tls_alone():
    callers = {module for module in MODULES if "OpenSSL" in foreign_imports(TREES[module])}
    assert callers == {"tls", "tls_context", "verification"}


def test_importing_a_module_starts_nothing():
    """Modules are imported bottom-up, so that what is found is told of the module that does it."""
    code = """
import importlib, logging, os, signal, sys, threading
import colorlog, configargparse, cryptography.x509, gevent.socket, OpenSSL.SSL, service_identity.cryptography
from gevent import monkey
from gevent._hub_local import get_hub_if_exists

def signals():
    return [signal.getsignal(number) for number in sorted(signal.valid_signals())]

def descriptors():
    return len(os.listdir("/proc/self/fd"))

events = []
watched = ("socket.__new__", "_thread.start_new_thread", "subprocess.Popen", "os.fork", "signal.signal")
signals_before, descriptors_before = signals(), descriptors()
sys.addaudithook(lambda event, _: event in watched and events.append(event))
for name in sys.argv[1:]:
    importlib.import_module("nodepass_gevent." + name)
    wrong = [*events]
    wrong += ["a handler"] * bool(logging.root.handlers + logging.getLogger("nodepass_gevent").handlers)
    wrong += ["level names"] * (logging.getLevelName(logging.WARNING) != "WARNING")
    wrong += ["threads"] * (threading.active_count() > 1)
    wrong += ["a hub"] * (get_hub_if_exists() is not None)
    wrong += ["patching"] * bool(monkey.saved)
    wrong += ["signals"] * (signals() != signals_before)
    wrong += ["descriptors"] * (descriptors() != descriptors_before)
    print(name, *wrong)
"""
    names = [module for layer in LAYERS for module in sorted(layer) if module not in ("__init__", "__main__")]
    assert run_python(code, *names).splitlines() == names


def test_only_the_entry_point_patches_and_does_so_first():
    patching = {
        module
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr.startswith("patch_")
    }
    assert patching == {"__main__"}
    _docstring, *before, _sys, _cli, _run = map(ast.unparse, TREES["__main__"].body)
    signals = "signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2))"
    assert before == ["import signal", signals, "from gevent import monkey", "monkey.patch_all()"]


@pytest.mark.parametrize("module", MODULES)
def test_no_except_is_bare_and_few_catch_everything(module):
    assert all(handler.type for handler in handlers(TREES[module]))
    broad = [handler.lineno for handler in handlers(TREES[module]) if "Exception" in caught(handler)]
    assert len(broad) <= CATCH_ALL.get(module, 0), broad


@pytest.mark.parametrize("module", MODULES)
def test_a_kill_is_cleaned_up_after_and_raised_again(module):
    kills = {"BaseException", "gevent.GreenletExit", "GreenletExit"}
    for handler in handlers(TREES[module]):
        if caught(handler) & kills:
            last = handler.body[-1]
            assert isinstance(last, ast.Raise) and last.exc is None, f"{module}:{handler.lineno}"


@pytest.mark.parametrize("module", MODULES)
def test_functions_and_modules_stay_short(module):
    assert len((PACKAGE / f"{module}.py").read_text().splitlines()) <= MAX_MODULE
    for node in ast.walk(TREES[module]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION, f"{module}.{node.name} has {length} lines"


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is(module):
    assert ast.get_docstring(TREES[module])


@pytest.mark.parametrize("module", MODULES)
def test_no_module_is_named_after_nothing(module):
    assert module not in {"utils", "util", "common", "helpers", "base", "misc"}
