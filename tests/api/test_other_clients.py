"""LangChain, LiteLLM and lm-eval against the embedded model on a real port: only the base URL is ours."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_server import LiveServer, live_server

HI = "What does textwrap.dedent do?"


@pytest.fixture(scope="module")
def live() -> Iterator[LiveServer]:
    with live_server("cpu-eager") as server:
        yield server


@pytest.fixture(autouse=True)
def _own_template(live: LiveServer) -> Iterator[None]:
    yield
    live.client.tokenizer = live.plain


class TestLangChain:
    """langchain-openai."""

    @pytest.fixture
    def chat(self, live: LiveServer) -> Any:
        library = pytest.importorskip("langchain_openai", reason="pip install langchain-openai")
        return library.ChatOpenAI(
            model="embedded", base_url=f"{live.url}/v1", api_key="x", max_tokens=12, temperature=0,
            max_retries=0,
        )  # fmt: skip

    def test_invoke_and_stream(self, chat: Any) -> None:
        answer = chat.invoke([("system", "Be short."), ("human", HI)])
        assert answer.content
        assert answer.usage_metadata["output_tokens"] > 0
        assert answer.response_metadata["finish_reason"] in ("stop", "length")
        chat.stream_usage = True  # off for base URLs that it doesn't know
        pieces = list(chat.stream([("system", "Be short."), ("human", HI)]))
        assert "".join(piece.content for piece in pieces) == answer.content
        assert (
            sum(p.usage_metadata["output_tokens"] for p in pieces if p.usage_metadata)
            == (answer.usage_metadata["output_tokens"])
        )

    def test_batch(self, chat: Any) -> None:
        assert [bool(one.content) for one in chat.batch([HI, "hi"])] == [True, True]

    def test_tools(self, live: LiveServer, chat: Any) -> None:
        pytest.importorskip("llguidance", reason="forced calls need llguidance")
        from pydantic import BaseModel, Field

        class Weather(BaseModel):
            """Weather of a city."""

            days: int = Field(ge=1, le=9)

        live.speak("hermes")
        forced = chat.bind_tools([Weather], tool_choice="Weather").bind(max_tokens=80)
        (call,) = forced.invoke(HI).tool_calls
        assert call["name"] == "Weather"
        assert 1 <= call["args"]["days"] <= 9
        gathered = None
        for chunk in forced.stream(HI):
            gathered = chunk if gathered is None else gathered + chunk
        assert gathered is not None
        assert [(c["name"], c["args"]) for c in gathered.tool_calls] == [
            (call["name"], call["args"])
        ]

    def test_structured_output(self, chat: Any) -> None:
        pytest.importorskip("llguidance", reason="structured output needs llguidance")
        from pydantic import BaseModel

        class Verdict(BaseModel):
            fine: bool

        chat.max_tokens = 60
        verdict = chat.with_structured_output(Verdict, method="json_schema").invoke(HI)
        assert isinstance(verdict, Verdict)

    def test_embeddings(self, live: LiveServer) -> None:
        """It tokenises with tiktoken unless told not to; then it sends the texts."""
        library = pytest.importorskip("langchain_openai", reason="pip install langchain-openai")
        embed = library.OpenAIEmbeddings(
            model="embedded", base_url=f"{live.url}/v1", api_key="x",
            check_embedding_ctx_length=False,
        )  # fmt: skip
        rows = np.array(embed.embed_documents(["import os", "def f(x):"]))
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
        np.testing.assert_allclose(embed.embed_query("import os"), rows[0], atol=1e-2)


class TestLiteLLM:
    """litellm, as a client."""

    @pytest.fixture
    def library(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it asks the internet
        return pytest.importorskip("litellm", reason="pip install litellm")

    @pytest.fixture
    def options(self, live: LiveServer) -> dict[str, Any]:
        return {"api_base": f"{live.url}/v1", "api_key": "x", "num_retries": 0}

    @pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
    def test_chat(self, library: Any, options: Any, provider: str) -> None:
        asked = {
            "model": f"{provider}/embedded", "max_tokens": 8, "temperature": 0,
            "messages": [{"role": "user", "content": HI}], **options,
        }  # fmt: skip
        whole = library.completion(**asked)
        assert whole.choices[0].message.content
        assert whole.usage.completion_tokens == 8
        streamed = "".join(
            chunk.choices[0].delta.content or ""
            for chunk in library.completion(**asked, stream=True)
        )
        assert streamed == whole.choices[0].message.content

    def test_text_and_embeddings(self, library: Any, options: Any) -> None:
        text = library.text_completion(
            model="text-completion-openai/embedded", prompt="import ", max_tokens=4, **options
        )
        assert text.choices[0].text
        found = library.embedding(model="openai/embedded", input=["import os"], **options)
        assert np.linalg.norm(found.data[0]["embedding"]) == pytest.approx(1, abs=1e-5)

    def test_errors(self, library: Any, options: Any) -> None:
        with pytest.raises(library.ContextWindowExceededError):
            library.completion(
                model="openai/embedded", messages=[{"role": "user", "content": "word " * 5000}],
                **options,
            )  # fmt: skip


TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
metadata: {{version: 1}}
"""
CHOICES = """\
output_type: multiple_choice
doc_to_choice: ["os", "qqqq zzzz"]
metric_list: [{metric: acc}]
"""
WRITES = """\
output_type: generate_until
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, temperature: 0}
metric_list: [{metric: exact_match}]
"""


def test_lm_eval_local_completions(live: LiveServer, tmp_path: Path) -> None:
    """A task of our own: likelihoods by echo and logprobs, and text up to a stop string."""
    pytest.importorskip("lm_eval", reason="pip install lm-eval")
    data = tmp_path / "questions.jsonl"
    rows = [
        {"question": question, "answer": "os"} for question in ("import", "from", "import sys,")
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, kind in (("halyard_choices", CHOICES), ("halyard_writes", WRITES)):
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + kind)
    arguments = (
        f"model=embedded,base_url={live.url}/v1/completions,tokenizer_backend=huggingface,"
        f"tokenizer={Path(__file__).parents[2] / 'models' / 'embedded'},num_concurrent=2,"
        "max_retries=1,max_length=512,tokenized_requests=True"
    )
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", arguments,
         "--tasks", "halyard_choices,halyard_writes", "--include_path", str(tmp_path),
         "--output_path", str(tmp_path / "out"), "--log_samples"],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"),
                          "OPENAI_API_KEY": "x", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    assert results["halyard_choices"]["acc,none"] == 1.0  # "os" is likelier after import
    assert "exact_match,none" in results["halyard_writes"]
    (samples,) = (tmp_path / "out").rglob("samples_halyard_choices_*.jsonl")
    for line in samples.read_text().splitlines():
        for (likelihood, _), *_ in json.loads(line)["resps"]:
            assert -200 < float(likelihood) < 0
            assert math.isfinite(float(likelihood))
