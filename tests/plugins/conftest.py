"""An OpenAI-compatible endpoint on the loopback interface over any of our samplers, for others' programs."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tempering.core.records import Prompt


@pytest.fixture
def serve(monkeypatch):
    """A function: sampler -> (URL, list of the request bodies)."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    running = []

    def start(sampler):
        bodies, lock = [], threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                bodies.append(body)
                turns = tuple({"role": m["role"], "content": text_of(m["content"])} for m in body["messages"])
                limit = body.get("max_completion_tokens") or body.get("max_tokens") or 16
                with lock:
                    [group] = sampler(
                        [Prompt(turns)], n=body.get("n") or 1, max_new_tokens=limit, seed=body.get("seed") or 0,
                        temperature=body.get("temperature") or 0.0,
                    )  # fmt: skip
                choices = [
                    {"index": i, "message": {"role": "assistant", "content": c.text}, "finish_reason": c.finish}
                    for i, c in enumerate(group)
                ]
                usage = {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6}
                told = {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"]}
                content = json.dumps(told | {"choices": choices, "usage": usage}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        running.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}/v1", bodies

    yield start
    for server, thread in running:
        server.shutdown()
        thread.join()
        server.server_close()


def text_of(content):
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
