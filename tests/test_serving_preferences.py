"""Rankings of answers: what the page makes of clicks, what the server makes of it, and what the file then holds."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import fake_engine
import httpx
import pytest
from fake_engine import NAME

from maxlm import serving
from maxlm.config import UserError
from maxlm.serving.app import Service
from maxlm.serving.preferences import Preferences

PAGE = (Path(serving.__file__).parent / "chat_page.html").read_text()
(SCRIPT,) = re.findall(r"<script>(.*)</script>", PAGE, re.DOTALL)
ASKED = [{"role": "system", "content": "s"}, {"role": "user", "content": "H\u00ef\n"}]

BROWSER = """
class Element {
  constructor() { Object.assign(this, { children: [], handlers: {}, value: "", hidden: false, textContent: "",
    style: { setProperty() {} }, classList: { add() {}, toggle() {} }, parentElement: {} }); }
  append(...all) { this.children.push(...all); }
  replaceChildren() { this.children = []; }
  addEventListener(name, run) { this.handlers[name] = run; }
  scrollIntoView() {} focus() {} remove() {}
}
const elements = new Proxy({}, { get: (all, id) => all[id] ??= new Element() });
globalThis.document = { getElementById: (id) => elements[id], createElement: () => new Element(),
  querySelector: () => null };
globalThis.Option = function (id) { this.id = id; elements.model.value = id; };
const fetched = fetch;
globalThis.fetch = (path, options) => fetched(URL_ + "/" + path, options);
const until = async (ready) => { while (!ready()) await new Promise((done) => setTimeout(done, 10)); };
const all = (element) => [element, ...element.children.flatMap((child) => child.children ? all(child) : [])];
"""
"""As much of one as the page needs."""
RANK = """
(async () => {
  await until(() => elements.model.children.length);
  Object.assign(elements.answers, { value: "3" }); elements.system.value = "s"; elements.seed.value = "5";
  elements.text.value = "Question";
  elements.form.handlers.submit({ preventDefault() {} });
  const buttons = () => all(elements.turns).filter((one) => one.handlers.click);
  await until(() => buttons().length === 3);
  buttons()[2].handlers.click();
  buttons()[0].handlers.click();
  const notes = () => all(elements.turns).map((one) => one.textContent);
  await until(() => notes().some((text) => /pairs|same/.test(text)));
  const told = notes().filter((text) => /pairs|same/.test(text));
  console.log(JSON.stringify([told, buttons().map((one) => one.textContent),
    elements.answers.parentElement.hidden]));
})();
"""


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_all_pairs_of_a_ranking_are_kept(tmp_path: Path) -> None:
    served, file = fake_engine.make_served(tmp_path), tmp_path / "new/kept.jsonl"
    service = Service(models={NAME: served}, preferences=Preferences(file))
    body = {"messages": ASKED, "ranking": ["best", "middle", "w\u00f6rst"]}
    with fake_engine.running_server(service) as (url, _):
        post = lambda **more: httpx.post(f"{url}/preferences", json={**body, **more})
        assert post().json() == {"pairs": 3} and post(ranking=["b", ""]).json() == {"pairs": 1}
        wrong = [
            (post(ranking=["one"]), "ranking"), (post(ranking=list("abcde")), "ranking"),
            (post(ranking=["a", "a"]), "each answer once"), (post(file="/etc/passwd"), "file is not known here"),
            (post(messages=[*ASKED, *said("x")]), "must end before the answers"),
        ]  # fmt: skip
        for answer, words in wrong:
            assert answer.status_code == 400 and words in answer.json()["error"]["message"]
        file.unlink()
        file.mkdir()
        assert post().status_code == 500
        file.rmdir()
        service.preferences = None
        assert post().status_code == 400 and "--preferences FILE" in post().text
        service.preferences = Preferences(file)
        post(), post(ranking=["b", ""])
    found = lines(file)
    assert [(one["chosen"], one["rejected"]) for one in found] == [
        (said("best"), said("middle")), (said("best"), said("w\u00f6rst")), (said("middle"), said("w\u00f6rst")),
        (said("b"), said("")),
    ]  # fmt: skip
    assert all(one["messages"] == ASKED for one in found)
    with pytest.raises(UserError, match=r"--preferences .*: cannot be written \(Is a directory\); name another file"):
        Preferences(tmp_path)


@pytest.mark.parametrize("differ", [True, False])
def test_the_page_asks_for_answers_and_sends_their_ranking(tmp_path: Path, differ: bool) -> None:
    """Its whole script, on a page that is not shown, against the server."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    served, file = fake_engine.make_served(tmp_path), tmp_path / "kept.jsonl"
    loop: Any = served.loop
    loop.says = lambda request: f"seed {request.seed}" if differ else "same"
    with fake_engine.running_server(Service(models={NAME: served}, preferences=Preferences(file))) as (url, _):
        program = f"const URL_ = {json.dumps(url)};{BROWSER}{SCRIPT}{RANK}"
        done = subprocess.run([node, "-e", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    asked = [{"role": "system", "content": "s"}, {"role": "user", "content": "Question"}]
    pairs = [("seed 7", "seed 5"), ("seed 7", "seed 6"), ("seed 5", "seed 6")] if differ else []
    assert lines(file) == [{"messages": asked, "chosen": said(a), "rejected": said(b)} for a, b in pairs]
    note = "Saved, in pairs: 3" if differ else "All answers are the same: nothing is saved."
    assert json.loads(done.stdout) == [[note], ["2.", "3.", "1."], False]
