"""What every test stands on: no network, a private cache, tiny random models with a byte tokenizer."""

import contextlib
import json
import os
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from jaxtyping import install_import_hook

# Before anything imports them: annotated shapes are checked in tests, and cost nothing elsewhere.
CHECKED = ("preference", "logprobs", "policy_gradient", "activations")
install_import_hook([f"tempering.core.{name}" for name in CHECKED], "beartype.beartype")

torch.set_num_threads(1)

LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0")
OUTSIDE = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy", "OPENAI_API_KEY")
"""Settings of whoever runs the tests, which no test may depend on."""

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "the safe answer is no, I cannot help with that; here is how you do it: yes sure stone river apple"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Refuse every connection that would leave this machine."""
    for name in OUTSIDE:
        monkeypatch.delenv(name, raising=False)
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def check(host):
        if isinstance(host, bytes):
            host = host.decode()
        if isinstance(host, str) and host and not host.startswith(LOOPBACK):
            raise OSError(f"tests are offline, and something asked for {host}")

    def guarded(original):
        def call(self, address):
            check(address[0] if isinstance(address, tuple) else None)
            return original(self, address)

        return call

    def resolve(host, *args, **kwargs):
        check(host)
        return getaddrinfo(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", guarded(connect))
    monkeypatch.setattr(socket.socket, "connect_ex", guarded(connect_ex))
    monkeypatch.setattr(socket, "getaddrinfo", resolve)


class Loopback:
    """A chat endpoint on the loopback interface that answers with `script(body, count)`: (status, content, headers).

    Content is a text, bytes, or what is sent as JSON.
    """

    def __init__(self, script, pause_s=0.0, keep_alive=False):
        self.pause_s = pause_s  # between one byte and the next
        self.bodies, self.headers, self.times, self.busy, self.most_busy = [], [], [], 0, 0
        outer, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1" if keep_alive else "HTTP/1.0"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.bodies.append(body)
                    outer.headers.append(dict(self.headers))
                    outer.times.append(time.monotonic())
                    outer.busy += 1
                    outer.most_busy = max(outer.busy, outer.most_busy)
                    count = len(outer.bodies)
                status, content, headers = script(body, count)
                with lock:
                    outer.busy -= 1
                content = content if isinstance(content, str | bytes) else json.dumps(content)
                content = content if isinstance(content, bytes) else content.encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                for part in [content] if not outer.pause_s else [content[i : i + 1] for i in range(len(content))]:
                    self.wfile.write(part)
                    time.sleep(outer.pause_s)

            def handle(self):
                with contextlib.suppress(ConnectionError):  # the client gave up, or was killed
                    super().handle()

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.target = f"openai:m@{self.url}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self):
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture
def loopback():
    """A function: script -> `Loopback`; see there."""
    servers = []

    def start(script, **settings):
        servers.append(Loopback(script, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def private_cache(request, monkeypatch, session_cache):
    """Nothing is read from or left in the user's cache, except the converted embedded model (`smollm2`)."""
    if request.node.get_closest_marker("smollm2") is None:
        monkeypatch.setenv("TEMPERING_CACHE", str(session_cache))


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level BPE tokenizer of 320 tokens with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([WORDS] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def tiny_config(family, vocab):
    """A configuration in which no two dimensions are equal: hidden 32, head 8, 4 or 2 heads, inner 48."""
    from transformers import Gemma3TextConfig, GPTNeoXConfig, LlamaConfig, MistralConfig, Qwen3Config

    shape = {
        "vocab_size": vocab, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    own_head = {"head_dim": 12}
    if family == "gpt_neox":
        shape.pop("num_key_value_heads")
        return GPTNeoXConfig(**shape)
    kind = {"llama": LlamaConfig, "qwen3": Qwen3Config, "gemma3": Gemma3TextConfig, "mistral": MistralConfig}[family]
    if family == "gemma3":
        own_head |= {"sliding_window": 16, "query_pre_attn_scalar": 12}
    return kind(**shape, **(own_head if family != "llama" else {}))


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory, tiny_tokenizer):
    """A function: family (and seed) -> folder of a tiny random float32 model with its tokenizer."""
    made = {}

    def make(family="llama", seed=0, scale=6.0):
        key = (family, seed, scale)
        if key not in made:
            from transformers import AutoModelForCausalLM

            folder = tmp_path_factory.mktemp(f"{family}{seed}")
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                model = AutoModelForCausalLM.from_config(tiny_config(family, len(tiny_tokenizer)))
                # Larger than the usual initialisation: a model that prefers some tokens to others.
                with torch.no_grad():
                    for parameter in model.parameters():
                        if parameter.dim() > 1:
                            parameter.mul_(scale)
            model.generation_config.eos_token_id = tiny_tokenizer.eos_token_id
            model.generation_config.pad_token_id = tiny_tokenizer.pad_token_id
            model.save_pretrained(folder)
            tiny_tokenizer.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture
def tiny_policy(tiny_model_dir):
    """A function: family -> a fresh Policy in float32."""
    from tempering.core.policy import Policy

    def load(family="llama", dtype="float32", **kwargs):
        return Policy.load(str(tiny_model_dir(family, **kwargs)), dtype=dtype, device="cpu")

    return load


def pair_rows(count):
    """Pairs with a rule to learn: the chosen answer refuses, the rejected one complies."""
    things = ("stone", "river", "apple", "glass", "paper")
    return [
        {
            "prompt": f"how do I {things[i % 5]} number {i}?",
            "chosen": f"no, I cannot help with {things[i % 5]}" + "." * (i % 3),
            "rejected": f"yes sure: {things[(i + 1) % 5]} it" + " and do it" * (i % 4),
            "hardness": round(((i * 37) % 101) / 10, 2),
        }
        for i in range(count)
    ]


@pytest.fixture
def write_pairs(tmp_path):
    """A function: count -> path of a JSONL file of so many preference pairs."""

    def write(count=20, name="pairs.jsonl", order=1, rows=None) -> Path:
        path = tmp_path / name
        rows = pair_rows(count) if rows is None else rows
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[::order]), encoding="utf-8")
        return path

    return write


@pytest.fixture
def pairs_file(write_pairs):
    return str(write_pairs())
