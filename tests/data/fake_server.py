"""An OpenAI-compatible server that answers "<port>: <last message>", to be killed: `fake_server.py PORT SECONDS`."""

import http.server
import json
import sys
import time


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    seconds = 0.0  # an answer takes

    def do_GET(self):
        self.answer({"object": "list", "data": [{"id": "tiny", "object": "model", "created": 0, "owned_by": ""}]})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(self.seconds)
        text = f"{self.server.server_port}: {request['messages'][-1]['content']}"
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        usage = {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
        answer = {"id": "x", "object": "chat.completion", "created": 0, "model": "tiny", "usage": usage}
        self.answer(answer | {"choices": [choice]})

    def answer(self, body):
        data = json.dumps(body).encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        self.wfile.write(head.encode() + data)

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    Handler.seconds = float(sys.argv[2])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
