"""A watched folder yields only finished images, each once, even after a restart. Results go only to the webhook."""

from __future__ import annotations

import errno
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from echo_ft.config import PARTLY_DONE
from echo_ft.errors import EchoError
from echo_ft.inference import watch as watch_module
from echo_ft.inference.inspector import Result
from echo_ft.inference.watch import BROKEN_SECONDS, SETTLED_SECONDS, STATE_FILE, FolderWatch, post
from evaluation import inspect
from tests.conftest import draw


class EndOfTestError(Exception):
    """Ends the endless watch."""


class Clock:
    """A clock that runs only while the watch sleeps, and performs actions at given times."""

    def __init__(self, end: float, **actions) -> None:
        self.now, self.end = 0.0, end
        self.actions = {float(name.removeprefix("at_").replace("_", ".")): action for name, action in actions.items()}

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for time in sorted(time for time in self.actions if time <= self.now):
            self.actions.pop(time)()
        if self.now > self.end:
            raise EndOfTestError


def seen(folder, end=10.0, stop_after=None, **actions):
    """The names of the images that a watch yields, with the time and whether they are broken."""
    clock, found = Clock(end, **actions), []
    with FolderWatch(folder, clock, clock.sleep) as watch, pytest.raises(EndOfTestError):
        for path, error in watch.images():
            found.append((path.name, clock.now, error is not None))
            if len(found) == stop_after:
                raise EndOfTestError
    return found


@pytest.fixture
def whole(tmp_path):
    """The content of an image."""
    draw(tmp_path / "source" / "a.png", (60, 60), 1)
    return (tmp_path / "source" / "a.png").read_bytes()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "line").mkdir()
    return tmp_path / "line"


def test_an_image_counts_once_it_has_not_changed_for_a_while(folder, whole):
    path = folder / "slow.png"
    path.write_bytes(whole[:100])

    def grow(size):
        return lambda: path.write_bytes(whole[:size])

    found = seen(folder, at_1=grow(200), at_2_5=grow(len(whole)))
    assert [name for name, _, _ in found] == ["slow.png"]
    assert found[0][1] >= 2.5 + SETTLED_SECONDS


def test_a_pause_in_writing_is_not_the_end(folder, whole):
    """A camera may pause for longer than the time after which an unchanged file counts as finished."""
    path = folder / "paused.png"
    path.write_bytes(whole[: len(whole) // 2])
    found = seen(folder, end=20, at_8=lambda: path.write_bytes(whole))
    assert found == [("paused.png", pytest.approx(8 + SETTLED_SECONDS, abs=1.1), False)]


def test_a_broken_image_is_reported_after_a_longer_time_and_costs_no_other(folder, whole):
    (folder / "broken.png").write_bytes(whole[: len(whole) // 2])
    (folder / "good.png").write_bytes(whole)
    found = seen(folder, end=2 * BROKEN_SECONDS)
    assert [(name, broken) for name, _, broken in found] == [("good.png", False), ("broken.png", True)]
    assert found[1][1] >= BROKEN_SECONDS


def test_an_image_that_does_not_stop_changing_is_named_once(folder, whole, capsys):
    """A camera that writes every image to the same file must pause, or no image is ever finished."""
    (folder / "good.png").write_bytes(whole)

    def write(size):
        return lambda: (folder / "latest.png").write_bytes(whole + bytes(size))

    writes = {f"at_{second}": write(second) for second in range(1, int(2.5 * BROKEN_SECONDS))}
    found = seen(folder, end=3 * BROKEN_SECONDS, **writes)
    assert [name for name, _, _ in found] == ["good.png", "latest.png"]
    (warning,) = capsys.readouterr().err.splitlines()
    assert f"latest.png has kept changing for {BROKEN_SECONDS:g} s, so it was not inspected; write each" in warning


def test_an_image_that_is_finished_while_others_are_inspected_for_long_is_not_named(folder, whole, capsys):
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(whole)
    clock, found = Clock(3 * BROKEN_SECONDS), []
    clock.actions = {2.0: lambda: (folder / "slow.png").write_bytes(whole[:100])}
    with FolderWatch(folder, clock, clock.sleep) as watch, pytest.raises(EndOfTestError):
        for path, _ in watch.images():
            found.append(path.name)
            if len(found) == 2:
                (folder / "slow.png").write_bytes(whole)
            clock.now += BROKEN_SECONDS if len(found) < 3 else 0
    assert found == ["a.png", "b.png", "slow.png"]
    assert capsys.readouterr().err == ""


def test_hidden_temporary_and_other_files_are_left_alone(folder, whole):
    for name in (".a.png", "a.png.part", "a.tmp", "notes.txt", "Thumbs.db"):
        (folder / name).write_bytes(whole)
    (folder / "sub.png").mkdir()
    assert seen(folder) == []


def test_each_image_is_seen_once_even_after_a_restart(folder, whole):
    for index in range(3):
        (folder / f"{index}.png").write_bytes(whole)
        os.utime(folder / f"{index}.png", (1000 + index, 1000 + index))
    assert [name for name, _, _ in seen(folder, at_5=lambda: (folder / "3.png").write_bytes(whole))] == [
        "0.png",
        "1.png",
        "2.png",
        "3.png",
    ]
    assert seen(folder) == []
    (folder / "1.png").write_bytes(whole + b"\0")  # the camera writes its next image to the same file
    assert [name for name, _, _ in seen(folder)] == ["1.png"]


def test_an_image_that_was_not_finished_at_a_crash_is_seen_again(folder, whole):
    for index in range(3):
        (folder / f"{index}.png").write_bytes(whole)
        os.utime(folder / f"{index}.png", (1000 + index, 1000 + index))
    assert [name for name, _, _ in seen(folder, stop_after=2)] == ["0.png", "1.png"]
    with open(folder / STATE_FILE, "a") as file:
        file.write('{"image": "2.png", "si')  # the machine lost power
    assert [name for name, _, _ in seen(folder)] == ["1.png", "2.png"]
    assert [json.loads(line)["image"] for line in (folder / STATE_FILE).read_text().splitlines()] == [
        "0.png",
        "1.png",
        "2.png",
    ]


def test_an_image_whose_name_is_not_utf_8_is_seen_once(folder, whole):
    name = os.fsdecode(b"pr\xfcfung.png")
    (folder / name).write_bytes(whole)
    assert [found for found, _, _ in seen(folder)] == [name]
    assert seen(folder) == []


def test_an_image_that_goes_or_changes_while_others_are_inspected_waits_for_its_turn(folder, whole):
    for index in range(3):
        (folder / f"{index}.png").write_bytes(whole)
        os.utime(folder / f"{index}.png", (1000 + index, 1000 + index))
    clock, found = Clock(10.0), []
    with FolderWatch(folder, clock, clock.sleep) as watch, pytest.raises(EndOfTestError):
        for path, error in watch.images():
            if not found:
                (folder / "1.png").unlink()
                (folder / "2.png").write_bytes(whole + b"\0")
            found.append((path.name, clock.now, error))
    assert [(name, error) for name, _, error in found] == [("0.png", None), ("2.png", None)]
    assert found[1][1] >= found[0][1] + SETTLED_SECONDS


def test_the_first_of_many_new_images_does_not_wait_until_all_are_read(folder, whole, monkeypatch):
    for index in range(9):
        (folder / f"{index}.png").write_bytes(whole)
    read = []
    monkeypatch.setattr(watch_module, "_read_error", lambda path: read.append(path.name))
    assert [name for name, _, _ in seen(folder, stop_after=1)] == read


@pytest.fixture
def away(folder):
    """Functions that make the folder unavailable, as a network drive may be for a while, and available again."""
    elsewhere = folder.with_name("elsewhere")

    def leave(mount_point=False):
        folder.rename(elsewhere)
        if mount_point:
            folder.mkdir()

    def come_back():
        if folder.exists():
            folder.rmdir()
        elsewhere.rename(folder)

    return leave, come_back


@pytest.mark.parametrize("mount_point", [False, True])
def test_a_folder_that_is_away_for_a_while_costs_no_image(folder, whole, away, mount_point, capsys):
    """The folder goes twice. A drive that is away may leave an empty folder, in which all images are missing."""
    leave, come_back = away
    (folder / "0.png").write_bytes(whole)
    found = seen(
        folder,
        end=20,
        at_4=lambda: leave(mount_point),
        at_6=come_back,
        at_7=lambda: (folder / "1.png").write_bytes(whole),
        at_8=lambda: leave(mount_point),
        at_12=come_back,
    )
    assert [(name, broken) for name, _, broken in found] == [("0.png", False), ("1.png", False)]
    assert seen(folder) == []
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == (0 if mount_point else 2)  # one per outage
    assert all("line cannot be read (No such file or directory)" in warning for warning in warnings)
    assert all(warning.endswith("; the watch tries again until it succeeds") for warning in warnings)


def test_an_image_is_recorded_once_its_folder_is_back(folder, whole, away, capsys):
    leave, come_back = away
    (folder / "a.png").write_bytes(whole)
    clock = Clock(20.0, at_5=come_back)
    with FolderWatch(folder, clock, clock.sleep) as watch, pytest.raises(EndOfTestError):
        for _ in watch.images():
            leave()
    assert seen(folder) == []
    (warning,) = capsys.readouterr().err.splitlines()
    assert f"{STATE_FILE} cannot be written (No such file or directory); the watch tries again" in warning


def test_an_image_that_fails_because_its_folder_goes_is_seen_again(folder, whole, away):
    leave, come_back = away
    (folder / "a.png").write_bytes(whole)
    clock, found = Clock(20.0, at_5=come_back), []
    with FolderWatch(folder, clock, clock.sleep) as watch, pytest.raises(EndOfTestError):
        for _ in watch.images():
            found.append(clock.now)
            if len(found) == 1:
                leave()
                watch.fail("it cannot be opened")
    assert len(found) == 2
    assert found[1] >= 5


def test_a_record_that_a_full_disk_cuts_off_is_written_again(folder, whole, monkeypatch):
    (folder / "a.png").write_bytes(whole)
    opened = []

    def open_full(path):
        opened.append(path)
        if len(opened) == 1:
            path.write_text('{"image": "a.p')
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return open(path, "a")

    monkeypatch.setattr(watch_module, "open_append", open_full)
    assert len(seen(folder)) == 1
    assert seen(folder) == []


def test_images_that_cannot_be_looked_up_are_not_forgotten(folder, whole, monkeypatch, capsys):
    """A drive may go after its folder was listed."""
    (folder / "a.png").write_bytes(whole)
    find, broken = watch_module._version, []

    def fail(path):
        if broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return find(path)

    monkeypatch.setattr(watch_module, "_version", fail)
    assert len(seen(folder, at_5=lambda: broken.append(True), at_7=broken.clear)) == 1
    assert "a.png cannot be read (Input/output error); the watch tries again" in capsys.readouterr().err


def test_one_failed_attempt_to_read_an_image_does_not_make_it_broken(folder, whole, monkeypatch):
    """The image has waited for long, because others were inspected."""
    (folder / "a.png").write_bytes(whole)
    read, failures = watch_module._read_error, ["no connection"]
    monkeypatch.setattr(watch_module, "SETTLED_SECONDS", 2 * BROKEN_SECONDS)
    monkeypatch.setattr(watch_module, "_read_error", lambda path: failures.pop() if failures else read(path))
    assert [broken for _, _, broken in seen(folder, end=3 * BROKEN_SECONDS)] == [False]
    assert not failures


def test_only_one_process_watches_a_folder_and_a_missing_one_is_named(folder):
    with FolderWatch(folder), pytest.raises(EchoError, match="another process is writing to"):
        FolderWatch(folder)
    with pytest.raises(EchoError, match=r"there is no folder .*absent to watch"):
        FolderWatch(folder / "absent")


class Webhook:
    """A webhook on the loopback interface that answers with the given status codes and records what it gets.

    With `endless`, its replies announce a body that never comes.
    """

    def __init__(self, *statuses, location="http://192.0.2.1/", endless=False) -> None:
        self.bodies: list[dict] = []
        remaining, hook = list(statuses), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                hook.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                status = remaining.pop(0) if remaining else 200
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", location)
                self.send_header("Content-Length", "5" if endless else "0")
                self.end_headers()
                if endless:
                    self.wfile.flush()
                    self.rfile.read(1)  # until the other side ends the connection

            def log_message(self, *_: object) -> None:
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/results"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()


def test_a_webhook_that_is_not_available_gets_the_result_later():
    slept = []
    with Webhook(503, 429) as hook:
        post(hook.url, {"image": "a"}, slept.append)
    assert hook.bodies == [{"image": "a"}] * 3
    assert slept == [1.0, 2.0]
    with pytest.raises(EchoError, match=r"did not accept a result for 5 s .*no connection.*inspects that image again"):
        post(hook.url, {}, slept.append, patience=5)


def test_the_body_of_a_reply_is_not_waited_for():
    with Webhook(endless=True) as hook:
        post(hook.url, {"image": "a"}, sleep=pytest.fail)
    assert hook.bodies == [{"image": "a"}]


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_no_redirect_is_followed(status):
    with Webhook() as other, Webhook(status, location=other.url) as hook:
        with pytest.raises(EchoError, match=f"redirects to {other.url}, which is not followed; give the final address"):
            post(hook.url, {"image": "a"})
        assert len(hook.bodies) == 1
        assert other.bodies == []


class QuickInspector:
    """Inspects any image at once, without a model."""

    def possible_products(self, product):
        return []

    def stream(self, images, product):
        return (self.predict(image, product) for image in images)

    def predict(self, path, product):
        return Result(str(path), 0.2, False, 0.5, "washer", None, None, "Even.", (), ())


def watched(folder, url):
    """Inspect the new images of a folder as the command does, and post the results to a webhook."""
    clock = Clock(5.0)
    with FolderWatch(folder, clock, clock.sleep) as watch, pytest.raises(EndOfTestError):
        inspect.inspect_new(watch, QuickInspector(), inspect.InspectConfig(webhook=url))


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_result_that_the_webhook_rejects_costs_no_other(folder, whole, monkeypatch, capsys, status):
    """The webhook rejects the error about the first image and the result of the second one."""
    for index, content in enumerate((whole[:100], whole, whole)):
        (folder / f"{index}.png").write_bytes(content)
        os.utime(folder / f"{index}.png", (1000 + index, 1000 + index))
    monkeypatch.setattr(watch_module, "BROKEN_SECONDS", 0.0)
    with Webhook(status, status) as hook:
        for _ in range(2):
            watched(folder, hook.url)
    assert [body["image"] for body in hook.bodies] == [str(folder / f"{index}.png") for index in range(3)]
    with open(folder / STATE_FILE) as file:
        errors = [json.loads(line)["error"] for line in file]
    assert errors[0].startswith("the image is broken")
    assert f"rejects this result (status {status}); check which results it accepts" in errors[1]
    assert errors[2] is None
    printed = capsys.readouterr()
    assert f"1.png: {errors[1]}; it is not posted again" in printed.err
    assert "1.png: ok, P(defect) 0.200" in printed.out  # the result itself is printed


def test_a_result_that_the_webhook_rejects_costs_no_other_image_of_a_folder(folder, whole, monkeypatch, capsys):
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(whole)
    monkeypatch.setattr(inspect, "load_inspector", lambda config: QuickInspector())
    with Webhook(422) as hook:
        assert inspect.inspect_images(folder, inspect.InspectConfig(webhook=hook.url)) == PARTLY_DONE
    assert [body["image"] for body in hook.bodies] == [str(folder / "a.png"), str(folder / "b.png")]
    printed = capsys.readouterr()
    assert "0 of 2 images flagged, 1 not accepted by the webhook" in printed.out
    assert "a.png: the webhook" in printed.err
    with Webhook(422) as hook, pytest.raises(EchoError, match="rejects this result"):
        inspect.inspect_images(folder / "a.png", inspect.InspectConfig(webhook=hook.url))


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_webhook_that_rejects_every_result_stops_the_watch_and_costs_no_image(folder, whole, status):
    (folder / "a.png").write_bytes(whole)
    with Webhook(status) as hook:
        with pytest.raises(EchoError, match=f"rejects a result .status {status}.; check the address"):
            watched(folder, hook.url)
        watched(folder, hook.url)
    assert [body["image"] for body in hook.bodies] == [str(folder / "a.png")] * 2


def test_the_command_posts_every_result_and_every_broken_image_once(bundle, folder, whole, monkeypatch, capsys):
    (folder / "good.png").write_bytes(whole)
    (folder / "broken.png").write_bytes(whole[: len(whole) // 2])
    os.rename(folder / draw(folder / "strip.png", (1601, 8), 1), folder / os.fsdecode(b"str\xffp.png"))
    os.utime(folder / "good.png")  # it is the last one
    monkeypatch.setattr(watch_module, "SETTLED_SECONDS", 0.0)
    monkeypatch.setattr(watch_module, "BROKEN_SECONDS", 0.0)
    clock = Clock(2.0)
    monkeypatch.setattr(watch_module.FolderWatch.__init__, "__defaults__", (clock, clock.sleep))
    with Webhook() as hook:
        arguments = ["--watch", str(folder), "--bundle", str(bundle), "--webhook", hook.url, "--json", "true"]
        for _ in range(2):
            clock.now = 0.0
            with pytest.raises(EndOfTestError):
                inspect.main(arguments)
    results = {body["image"]: body for body in hook.bodies}
    assert len(hook.bodies) == 3
    assert results[str(folder / "good.png")]["answers"]
    assert "an image of 1601 x 8 pixels cannot be used" in results[rf"{folder}/str\udcffp.png"]["error"]
    with open(folder / STATE_FILE) as file:
        assert "1601 x 8" in next(line for line in file if "udcff" in line)
    assert "broken" in results[str(folder / "broken.png")]["error"]
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == results[str(folder / "good.png")]
