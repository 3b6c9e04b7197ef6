"""``fastlora chat``: its commands, its errors, and how it behaves in a pipe and in a terminal."""

from __future__ import annotations

import builtins
import io
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import train_qwen
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from fastlora import cli
from fastlora.serving import batching
from fastlora.serving.chat import COMMANDS, Chat, _generation, columns_of, side_by_side, wrap
from fastlora.serving.engine import Engine
from fastlora.serving.linears import Routing

NEW_TOKENS = 6
CHATS = train_qwen.read_chats(train_qwen.DATA)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random model with a tokenizer of single characters, and two adapters."""
    folder = tmp_path_factory.mktemp("chat")
    torch.manual_seed(0)
    model, tokenizer = train_qwen.load(None, CHATS)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    config = LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear")
    peft_model = get_peft_model(model, config, adapter_name="emoji")
    peft_model.add_adapter("nya", config)
    peft_model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference(folder):
    """What plain peft answers to messages, greedily."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    model = PeftModel.from_pretrained(model, folder / "emoji", adapter_name="emoji")
    model.load_adapter(folder / "nya", adapter_name="nya")

    @torch.no_grad()
    def answer(adapter, *contents, system="", prompt=None):
        """Answer a conversation of contents, the user's and the assistant's in turn."""
        messages = [{"role": "system", "content": system}] if system else []
        for i, content in enumerate(contents):
            messages.append({"role": ("user", "assistant")[i % 2], "content": content})
        if prompt is None:
            prompt = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        batch = tokenizer(prompt, return_tensors="pt")
        found = model.generate(
            **batch,
            adapter_names=["__base__" if adapter is None else adapter],
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
        text = tokenizer.decode(found[0, batch.input_ids.shape[1] :], skip_special_tokens=True)
        return text.lstrip()

    return answer


@pytest.fixture(scope="module")
def engine(folder):
    transformers.logging.disable_progress_bar()
    with Engine(folder / "model", device="cpu", adapter_memory="1MB") as engine:
        yield engine
    transformers.logging.enable_progress_bar()


def outcome(capsys, status=0):
    """Return what was written; of what was told, not that an answer was cut off."""
    captured = capsys.readouterr()
    told = [line for line in captured.err.splitlines() if not line.startswith("(cut off")]
    return SimpleNamespace(status=status, out=captured.out, told=told, all=captured.err)


@pytest.fixture
def chat(engine, folder, capsys):
    """Hold a chat of some lines with two adapters, of which the first answers."""
    engine.adapters.deactivate()
    for name in engine.adapters:
        engine.adapters.unload(name)
    for name in ("emoji", "nya"):
        engine.adapters.load(name, folder / name)
    engine.adapters.activate("emoji")

    def run(*lines, system="", **options):
        capsys.readouterr()
        chat = Chat(engine, system, **{"max_new_tokens": NEW_TOKENS, **options})
        chat.talk(f"{line}\n" for line in lines)
        return outcome(capsys)

    return run


@pytest.fixture
def command(folder, monkeypatch, capsys):
    """Run the command with lines from a pipe."""
    transformers.logging.disable_progress_bar()

    def run(*lines, arguments=(), model="model", adapters=("emoji", "nya"), stdin=io.StringIO):
        monkeypatch.setattr(sys, "stdin", stdin("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        loaded = [f"{name}={folder / name}" for name in adapters]
        status = cli.main(
            [
                "chat",
                *("--model", str(folder / model), "--device", "cpu", "--adapter-memory", "1MB"),
                *("--max-new-tokens", str(NEW_TOKENS), *arguments),
                *(["--adapter", *loaded] if loaded else []),
            ]
        )
        return outcome(capsys, status)

    return run


@pytest.fixture
def submitted(monkeypatch):
    """The prompt, adapter and options of all that is asked for, and the requests."""
    calls = []
    submit = Engine.submit

    def spy(self, prompt, adapter, **options):
        request = submit(self, prompt, adapter, **options)
        calls.append(SimpleNamespace(prompt=prompt, adapter=adapter, request=request, **options))
        return request

    monkeypatch.setattr(Engine, "submit", spy)
    return calls


def test_the_first_adapter_answers_a_pipe_and_goes_on_with_the_conversation(command, reference):
    first = reference("emoji", "hello", system="be kind")
    second = reference("emoji", "hello", first, "why", system="be kind")
    found = command("hello", "", "  why ", arguments=["--system", "be kind"])
    assert (found.status, found.told) == (0, [])
    assert found.out == f"{first}\n{second}\n"


def test_an_answer_is_a_stream_and_says_where_it_was_cut_off(chat, submitted):
    found = chat("hello")
    assert [call.stream for call in submitted] == [True]
    assert found.all == f"(cut off after {NEW_TOKENS} tokens)\n"


def test_use_and_base_change_who_answers_and_clear_forgets(chat, reference):
    nya = reference("nya", "hello")
    base = reference(None, "hello", nya, "why")
    anew = reference(None, "hello")
    assert len({nya, anew, reference("emoji", "hello")}) == 3
    found = chat("/use nya", "hello", "/base", "why", "/clear", "hello")
    assert found.told == []
    assert found.out == f"{nya}\n{base}\n{anew}\n"


def test_without_adapters_the_base_answers(command, reference):
    found = command("hello", adapters=())
    assert (found.status, found.out) == (0, f"{reference(None, 'hello')}\n")


@pytest.mark.parametrize("columns", [100, 60])
def test_compare_asks_all_in_one_batch_side_by_side_where_there_is_room(
    chat, reference, monkeypatch, columns
):
    monkeypatch.setenv("COLUMNS", str(columns))
    batches = []
    generate = Engine.generate

    def spy(self, prompts, adapters, **options):
        batches.append((len(prompts), list(adapters)))
        return generate(self, prompts, adapters, **options)

    monkeypatch.setattr(Engine, "generate", spy)
    names = ("base", "emoji", "nya")
    texts = {name: reference(None if name == "base" else name, "why").strip() for name in names}
    found = chat("/compare why", "/compare")
    assert found.told == []
    assert batches == [(3, [None, "emoji", "nya"])] * 2
    assert found.out == f"{side_by_side(texts, columns)}\n" * 2
    heading = found.out.splitlines()[0].split()
    assert heading == (list(names) if columns == 100 else ["base"])


def test_compare_is_apart_from_the_conversation(chat, reference, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    first = reference("emoji", "hello")
    second = reference("emoji", "hello", first, "why")
    found = chat("/compare", "hello", "/compare no", "/compare", "why")
    assert found.told == ["there is no question yet: it is /compare QUESTION"]
    lines = found.out.splitlines()
    assert (lines[0], lines[-1]) == (first, second)
    shown = [line for line in lines if line.strip() == reference("nya", "no").strip()]
    assert len(shown) == 2  # the last question was /compare's


def test_load_list_and_unload(chat, folder, reference):
    path = folder / "with space"
    shutil.copytree(folder / "nya", path, dirs_exist_ok=True)
    lines = ["/list", f"/load new {path}", "/use new", "/list", "hello", "/unload new", "/base"]
    found = chat(*lines, "/unload new", "/list", "/clear", "hello")
    assert found.told == ["new answers now: /base first, or /use another"]
    tables = found.out.split("adapter ")[1:]
    assert [[row.split()[0] for row in each.splitlines()[1:3]] for each in tables] == [
        ["emoji", "nya"]
    ] * 3
    assert "active" in tables[0].splitlines()[1]
    (row,) = [row for row in tables[1].splitlines() if row.startswith("new ")]
    assert row.endswith("active")
    assert "new is loaded: rank 4, q_proj" in tables[0]
    assert "active" not in tables[2]
    assert tables[1].splitlines()[-1] == reference("nya", "hello")
    assert found.out.splitlines()[-1] == reference(None, "hello")


def test_a_new_version_of_an_adapter_answers_from_then_on(chat, folder, reference):
    found = chat("hello", f"/load emoji {folder / 'nya'}", "/clear", "hello")
    lines = found.out.splitlines()
    assert (lines[0], lines[-1]) == (reference("emoji", "hello"), reference("nya", "hello"))


def test_what_is_wrong_is_told_in_one_line_each_and_the_chat_goes_on(chat, folder, reference):
    corrupt = folder / "corrupt"
    shutil.copytree(folder / "nya", corrupt, dirs_exist_ok=True)
    weights = corrupt / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    expected = {
        "/use nobody": "no adapter is called 'nobody'; loaded are: emoji, nya",
        "/unload nobody": "no adapter is called 'nobody'; loaded are: emoji, nya",
        "/load x /nowhere": "x: there is no folder '/nowhere'",
        "/load x/y /nowhere": "'x/y' cannot be the name of an adapter",
        f"/load x {corrupt}": "x: adapter_model.safetensors: ",
        f"/load emoji {corrupt}": "emoji: adapter_model.safetensors: ",
        "/load x": "it is /load NAME PATH",
        "/use": "it is /use NAME",
        "/list all": "it is /list",
        "/comprae": "there is no /comprae (did you mean /compare?); there are /use, /base, ",
        "/?": "there is no /?; there are /use, /base, /compare, /load, /unload, /list, /clear, ",
        "a" * 40000: "tokens, and the model's longest sequence 32768",
    }
    found = chat(*expected, "hello")
    assert found.out == f"{reference('emoji', 'hello')}\n"
    for line, told in zip(found.told, expected.values(), strict=True):
        assert told in line


def test_an_answer_that_fails_is_told_and_its_question_forgotten(chat, reference, monkeypatch):
    """On a line of its own; the next question is answered by a new loop."""
    submit = Engine.submit

    def fail(self, prompt, *rest, **options):
        request = submit(self, prompt, *rest, **options)
        if prompt[-1]["content"] != "fail":
            return request
        run = self._manager.batch_processor.model_runner.compute_batch

        def once(*args):
            if request._tokens.get(request.id):
                raise RuntimeError("no memory\nfor that")
            run(*args)

        monkeypatch.setattr(self._manager.batch_processor.model_runner, "compute_batch", once)
        return request

    monkeypatch.setattr(Engine, "submit", fail)
    found = chat("fail", "hello")
    assert len(found.told) == 1
    assert "no memory for that" in found.told[0]
    assert found.out.partition("\n")[2] == f"{reference('emoji', 'hello')}\n"


def test_help_names_every_command(chat):
    found = chat("/help")
    lines = found.out.splitlines()
    for name, (takes, does) in COMMANDS.items():
        assert any(line.startswith(f"/{name} {takes}".rstrip()) and does in line for line in lines)


@pytest.mark.parametrize("word", ["/quit", "/exit"])
def test_quit_ends_the_chat_before_the_end_of_file(chat, submitted, word):
    found = chat("hello", word, "why")
    assert (found.status, len(submitted)) == (0, 1)


class Interrupting(io.StringIO):
    """An output at whose third piece of text somebody presses Ctrl-C, once."""

    pieces = 0

    def write(self, text):
        self.pieces += bool(text)
        if self.pieces == 3:
            self.pieces += 1
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


# A tiny model may be done before anybody could stop it.
SLOW = """
import time
from fastlora.serving.linears import Routing

def slowly(*arguments, begin=Routing.begin):
    time.sleep(0.005)
    return begin(*arguments)

Routing.begin = slowly
"""


def test_ctrl_c_stops_the_answer_and_not_the_chat(chat, submitted, monkeypatch, reference, request):
    monkeypatch.setattr(Routing, "begin", Routing.begin)  # taken back afterwards
    exec(SLOW, {})
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    out = Interrupting()
    monkeypatch.setattr(sys, "stdout", out)
    whole = reference("emoji", "hello")
    found = chat("hello", "why", max_new_tokens=300)
    assert found.told == ["(stopped)"]
    first, second = submitted
    assert first.request.result(timeout=60).finish_reason == "cancelled"
    # What was written stays in the conversation.
    written = second.prompt[1]["content"]
    assert written[:2] == whole[:2]
    assert len(written) < 300
    assert out.getvalue().startswith(f"{written}\n")


def test_ctrl_c_stops_a_comparison(chat, monkeypatch, reference):
    def interrupted(self, *_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "generate", interrupted)
    found = chat("/compare why", "hello")
    assert found.told == ["(stopped)"]
    assert found.out == f"{reference('emoji', 'hello')}\n"


class InterruptedPipe(io.StringIO):
    """A pipe in which nothing comes until somebody presses Ctrl-C."""

    def __next__(self):
        raise KeyboardInterrupt


def test_ctrl_c_while_it_waits_for_a_pipe_ends_it(command):
    assert command("hello", stdin=InterruptedPipe).status == 130


def test_a_reader_that_goes_away_ends_it(command, monkeypatch):
    def write(text):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=write, isatty=lambda: False))
    found = command("hello", "why")
    assert (found.status, found.told) == (1, ["fastlora chat: [Errno 32] Broken pipe"])


# Without a chat template


@pytest.fixture
def without_template(folder):
    """The name of the same model without one."""
    path = folder / "plain"
    if not path.exists():
        shutil.copytree(folder / "model", path)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        tokenizer.chat_template = None
        tokenizer.save_pretrained(path)
        for each in path.glob("chat_template*"):
            each.unlink()
    return path.name


def test_without_a_chat_template_turns_are_plain_text(
    command, without_template, submitted, reference, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "20")
    first = reference("emoji", prompt="be kind\nUser: hello\nAssistant:")
    found = command(
        "hello", "why", "/compare no", arguments=["--system", "be kind"], model=without_template
    )
    assert found.told == [
        "the model has no chat template: it reads plain turns, User: and Assistant:"
    ]
    assert [call.prompt for call in submitted] == [
        "be kind\nUser: hello\nAssistant:",
        f"be kind\nUser: hello\nAssistant: {first}\nUser: why\nAssistant:",
    ]
    compared = reference("nya", prompt="be kind\nUser: no\nAssistant:").strip()
    assert compared in found.out


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (["yes", "\nUs", "er: and"], "yes"),
        ([" yes\nUser: and"], "yes"),
        (["yes\n", "\n", "User:"], "yes\n"),
        (["yes\nUse", " it"], "yes\nUse it"),
        (["yes\nUser"], "yes\nUser"),
    ],
)
def test_an_answer_in_plain_text_ends_where_it_goes_on_for_the_user(
    capsys, monkeypatch, pieces, shown
):
    monkeypatch.setenv("COLUMNS", "20")
    request = FakeRequest(pieces)
    text = "".join(pieces)
    engine = SimpleNamespace(
        tokenizer=SimpleNamespace(chat_template=None),
        adapters=FakeAdapters(),
        submit=lambda *_, **__: request,
        generate=lambda *_, **__: [SimpleNamespace(text=text, error=None)],
    )
    chat = Chat(engine)
    chat.talk(["hello"])
    assert capsys.readouterr().out == f"{shown}\n"
    assert chat.turns[-1]["content"] == shown
    assert request.cancelled
    chat.talk(["/compare"])
    assert capsys.readouterr().out == side_by_side({"base": shown.strip()}, 20) + "\n"


class FakeRequest:
    """A request that gives some pieces of text."""

    def __init__(self, pieces):
        self.pieces, self.cancelled = pieces, False

    def __iter__(self):
        return iter(self.pieces)

    def cancel(self):
        self.cancelled = True

    def result(self):
        return SimpleNamespace(finish_reason="cancelled")


class FakeAdapters(dict):
    """A pool without adapters."""

    active = None


# In a terminal


def test_a_prompt_shows_who_answers_and_ctrl_c_there_ends_nothing(
    command, folder, reference, monkeypatch
):
    typed = iter(["hello", KeyboardInterrupt, "/use nya", "/base", "/unload emoji", EOFError])
    prompts = []

    def fake_input(prompt):
        prompts.append(prompt)
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    monkeypatch.setattr(builtins, "input", fake_input)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", out)
        found = command(stdin=Terminal)
    assert (found.status, found.told) == (0, [])
    assert prompts == ["emoji> ", "emoji> ", "emoji> ", "nya> ", "base> ", "base> "]
    assert out.getvalue() == (
        f"{folder / 'model'} on cpu; /help says what can be done\n"
        f"{reference('emoji', 'hello')}\n\n/quit ends the chat\n\n"
    )


def read_until(terminal, wanted, seconds=60):
    """Return what a terminal shows, up to some bytes that must come."""
    shown = b""
    end = time.monotonic() + seconds
    while wanted not in shown:
        ready, _, _ = select.select([terminal], [], [], max(0.0, end - time.monotonic()))
        assert ready, f"{wanted!r} did not come after {shown!r}"
        shown += os.read(terminal, 4096)
    return shown


# Whoever runs the tests in the background lets them ignore Ctrl-C, and what they start.
RUN = """
import signal
from fastlora.cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)
raise SystemExit(main())
"""


def test_in_a_real_terminal_it_streams_stops_and_remembers(folder):
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", f"{SLOW}{RUN}", "chat", "--model", folder / "model"),
            *("--adapter", f"emoji={folder / 'emoji'}", "--adapter-memory", "1MB"),
            *("--device", "cpu", "--max-new-tokens", "20000"),
        ],
        stdin=end,
        stdout=end,
        stderr=end,
        start_new_session=True,
        env=os.environ | {"TERM": "dumb", "OMP_NUM_THREADS": "1"},
    )
    os.close(end)
    try:
        read_until(terminal, b"emoji> ")
        os.write(terminal, b"hello\n")
        read_until(terminal, b"hello\r\n")
        os.read(terminal, 1)  # of the answer
        process.send_signal(signal.SIGINT)
        assert b"(stopped)" in read_until(terminal, b"emoji> ")
        os.write(terminal, b"/base\n")
        read_until(terminal, b"base> ")
        os.write(terminal, b"\x10\n")  # Ctrl-P: the line before
        assert b"/base" in read_until(terminal, b"base> ")
        os.write(terminal, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


# Options


def told_at_the_start(capsys, *arguments):
    """Run the command, which must end in one line on stderr."""
    assert cli.main(["chat", *map(str, arguments)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("fastlora chat: ")
    return line


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model", "{folder}/model", "--adapter", "emoji"], "takes NAME=PATH, got 'emoji'"),
        (["--model", "{folder}/model", "--adapter", "=emoji"], "takes NAME=PATH, got '=emoji'"),
        (["--model", "{folder}/model", "--adapter", "a=b", "--adapter", "a=c"], "'a' twice"),
        (["--model", "{folder}/model", "--adapter", "a=/nowhere"], "a: there is no folder"),
        (["--model", "{folder}/model", "--adapter-memory", "much"], "size"),
        (["--model", "{folder}/model", "--max-new-tokens", "0"], "must be positive, got 0"),
        (["--model", "{folder}/model", "--temperature", "-1"], "must be 0 or more, got -1.0"),
        (["--model", "{folder}/model", "--device", "none"], "none"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--model", "nobody/nothing"], "nobody/nothing"),
        (["--model", "{folder}/emoji"], "emoji"),
    ],
)
def test_what_cannot_begin_ends_in_one_line(folder, capsys, arguments, told):
    transformers.logging.disable_progress_bar()
    given = [each.format(folder=folder) for each in arguments]
    if "--adapter-memory" not in given:
        given += ["--adapter-memory", "1MB"]
    assert told in told_at_the_start(capsys, *given)


def test_a_model_without_a_tokenizer_is_told(folder, capsys, monkeypatch):
    def missing(name):
        raise OSError("there are no such files")

    transformers.logging.disable_progress_bar()
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", missing)
    given = ["--model", folder / "model", "--adapter-memory", "1MB"]
    assert "model has no tokenizer" in told_at_the_start(capsys, *given)


def test_a_transformers_that_cannot_stream_is_told_before_the_model_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr(batching, "unsupported_reason", lambda: "transformers 9 is installed")
    assert "transformers 9 is installed" in told_at_the_start(capsys, "--model", "/nowhere")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there_is_told(capsys):
    assert "no CUDA device" in told_at_the_start(capsys, "--model", "/nowhere", "--device", "cuda")


@pytest.mark.parametrize(
    ("temperature", "options"),
    [
        ([], {}),
        (["--temperature", "0"], {"do_sample": False, "temperature": 0.0}),
        (["--temperature", "0.7"], {"do_sample": True, "temperature": 0.7}),
    ],
)
def test_options_become_those_of_generation(temperature, options):
    given = cli._parser().parse_args(["chat", "--model", "m", *temperature])
    assert _generation(given) == {"max_new_tokens": 256, **options}


def test_help_imports_little_and_names_every_option():
    script = (
        "import sys\n"
        "from fastlora import cli\n"
        "try:\n    cli.main(['chat', '--help'])\n"
        "finally:\n    print('IMPORTED', *sys.modules)\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    text, _, imported = found.stdout.partition("IMPORTED")
    assert found.returncode == 0
    assert not {"torch", "peft", "transformers", "triton"} & set(imported.split())
    for option in ("model", "adapter", "adapter-memory", "device", "dtype", "system"):
        assert f"--{option} " in text
    for option in ("--max-new-tokens", "--temperature", "NAME=PATH"):
        assert option in text


# Columns


def test_columns_stand_below_each_other_whatever_is_written_in_them():
    texts = {"base": "I am 小李 🙂", "emoji": "é" * 30 + " x", "nya": "e\u0301\n\nnya"}
    lines = side_by_side(texts, 78).splitlines()
    assert lines[:2] == [f"{'base':24}  {'emoji':24}  nya", "  ".join(["-" * 24] * 3)]
    assert lines[2:] == [
        f"I am 小李 🙂{' ' * 12}  {'é' * 24}  e\u0301",
        f"{' ' * 24}  éééééé x",
        f"{' ' * 24}  {' ' * 24}  nya",
    ]


def test_without_room_for_columns_texts_stand_one_below_another_as_they_are():
    texts = {"base": "I am\n\n小李", "emoji": "é" * 90}
    below = f"base\n  I am\n\n  小李\nemoji\n  {'é' * 90}"
    assert side_by_side(texts, 49) == side_by_side(texts, 0) == below
    assert side_by_side(texts, 50) != below


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("", 9, []),
        ("two words", 9, ["two words"]),
        ("two words", 8, ["two", "words"]),
        ("long words", 3, ["lon", "g", "wor", "ds"]),
        ("你好世界", 5, ["你好", "世界"]),
        ("a\n\nb", 5, ["a", "", "b"]),
        ("  in\tdented", 20, ["  in    dented"]),
    ],
)
def test_a_text_is_broken_by_the_columns_that_it_takes(text, width, lines):
    assert wrap(text, width) == lines


@pytest.mark.parametrize(
    ("text", "columns"), [("abc", 3), ("小李", 4), ("🙂", 2), ("e\u0301", 1), ("a\u200db", 2)]
)
def test_columns_of_characters(text, columns):
    assert columns_of(text) == columns
