"""Any endpoint that speaks OpenAI's chat completions, asked with patience and remembered."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, cast
from urllib.parse import urlsplit

from mxd.atomic import canonical_json, write_json_atomically

if TYPE_CHECKING:
    import openai

KEY_VARIABLE = "MXD_JUDGE_KEY"
OPENAI_VARIABLE, OPENAI_HOST = "OPENAI_API_KEY", "api.openai.com"
FAILURES_IN_A_ROW = 3
"""After so many questions in a row that an endpoint did not answer at all, it is not asked the rest."""
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_SHOWN = 120
"""Characters of an answer or an error that a message quotes."""
_SHORTEST_KEY = 6
"""A shorter key is a word such as `EMPTY`, which servers of one's own are given, and no secret."""

T = TypeVar("T")


class Endpoint(NamedTuple):
    """Who is asked."""

    url: str
    """Base URL, such as `http://localhost:8000/v1`."""
    model: str
    """The model's name there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeConfig:
    """Which endpoints judge, and how patiently they are asked."""

    judge: tuple[tuple[str, str], ...] = ()
    """Base URL and model of each judge: any endpoint that speaks OpenAI's chat completions, as in
    `http://localhost:8000/v1 llama-3.1-8b`. The key is taken from the environment: MXD_JUDGE_KEY for the server of the
    first judge, MXD_JUDGE_KEY_2 for the next server, and so on; no server gets another's key."""
    judge_timeout: float = 60.0
    """Seconds to wait for an answer."""
    judge_retries: int = 4
    """How often a question is asked again where the endpoint is down, slow or busy; where it answers nonsense, once."""
    judge_at_once: int = 4
    """Questions that are asked at the same time."""
    judge_price: tuple[float, float] | None = None
    """Price of a million tokens that are read and of a million that are written, for the estimate."""
    dry_run: bool = False
    """Print what asking would cost, and do not ask."""

    def __post_init__(self) -> None:
        if not self.judge_timeout > 0 or self.judge_retries < 0 or self.judge_at_once < 1:
            raise ValueError(
                "judge-timeout must be above 0, judge-retries at least 0 and judge-at-once at least 1; got "
                f"{self.judge_timeout}, {self.judge_retries} and {self.judge_at_once}."
            )
        for endpoint in self.endpoints:
            require_endpoint(endpoint, self.key_variable(endpoint))

    @property
    def endpoints(self) -> list[Endpoint]:
        """The judges, each once."""
        return list(dict.fromkeys(Endpoint(*judge) for judge in self.judge))

    def key_variable(self, endpoint: Endpoint) -> str:
        """Return which variable of the environment holds a judge's key: each server has one of its own."""
        servers = list(dict.fromkeys([*(_server(one.url) for one in self.endpoints), _server(endpoint.url)]))
        number = 1 + servers.index(_server(endpoint.url))
        return KEY_VARIABLE if number == 1 else f"{KEY_VARIABLE}_{number}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Question(Generic[T]):
    """What a judge is asked, and how its answer is read."""

    system: str
    """Its task."""
    user: str
    """The case at hand."""
    longest: int
    """Tokens of an answer at most."""
    read: Callable[[str], T]
    """Returns what an answer says; raises ValueError for one that does not say it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A question that was not answered."""

    reason: str
    """Why, in a sentence."""
    final: bool
    """Whether the endpoint did not answer at all (it is down, slow or busy, or takes no key), as it will the next."""


class Estimate(NamedTuple):
    """What asking will cost, about: each question once, with an answer of full length.

    An answer that makes no sense is asked for once more, and how many tokens a text is, only the judge's own tokenizer
    knows: it is an estimate and no bound.
    """

    calls: int
    """Questions that no cache answers."""
    read: int
    """Tokens that the judge reads, about."""
    written: int
    """Tokens that it writes where every answer is of full length."""
    cost: float | None
    """What that costs; None where no price is known."""

    def __str__(self) -> str:
        """Return the estimate in words."""
        words = f"{self.calls} calls, about {self.read:,} tokens read and {self.written:,} written"
        return f"{words}: about {self.cost:,.4f} at the given price" if self.cost is not None else words


def tokens_about(text: str) -> int:
    """Return how many tokens a text is, about: one for every 3.5 ASCII characters, and one for each other byte.

    Tokenizers that never saw a script fall back to its bytes, so what is not ASCII is rather over- than understated.
    """
    others = sum(len(character.encode("utf-8", "surrogatepass")) for character in text if not character.isascii())
    return round(sum(map(str.isascii, text)) / 3.5) + others


class Judge:
    """One endpoint, its cache, and what it costs.

    Args:
        endpoint: Who is asked.
        config: How patiently.
        cache: Folder of the answers; an answer that could be read is never asked for again.

    Raises:
        ValueError: If the `openai` package is missing, or the key would travel unencrypted.
    """

    def __init__(self, endpoint: Endpoint, config: JudgeConfig, cache: Path) -> None:
        variable = config.key_variable(endpoint)
        require_endpoint(endpoint, variable)
        self.endpoint, self.config, self.cache = endpoint, config, cache
        self._key = _key(endpoint, variable)
        self._client = _client(endpoint, config, self._key)
        self._unanswered = 0

    def estimate(self, questions: Sequence[Question[Any]]) -> Estimate:
        """Return what asking these would cost, about."""
        new = {self._path(question): question for question in questions if self._remembered(question) is None}
        read = sum(tokens_about(question.system + question.user) for question in new.values())
        return self.priced(len(new), read, sum(question.longest for question in new.values()))

    def priced(self, calls: int, read: int, written: int) -> Estimate:
        """Return what so many calls and tokens cost."""
        price = self.config.judge_price
        cost = None if price is None else (read * price[0] + written * price[1]) / 1e6
        return Estimate(calls, read, written, cost)

    def ask(self, questions: Sequence[Question[T]]) -> Iterator[T | Failure]:
        """Yield what each question's answer says, or why there is none, in order.

        Questions whose answer is remembered are not asked; equal ones are asked once.
        """
        size = self.config.judge_at_once
        with ThreadPoolExecutor(size) as pool:
            for start in range(0, len(questions), size):
                some = questions[start : start + size]
                if self._unanswered >= FAILURES_IN_A_ROW:
                    yield from (self._remembered_or_given_up(question) for question in some)
                    continue
                different = {self._path(question): question for question in some}
                asked = {path: pool.submit(self._one, question) for path, question in different.items()}
                counted: set[Path] = set()
                for question in some:
                    path = self._path(question)
                    answer, remembered = asked[path].result()
                    # What is remembered says nothing of whether the endpoint still answers.
                    if not remembered and path not in counted:
                        counted.add(path)
                        self._unanswered = self._unanswered + 1 if isinstance(answer, Failure) and answer.final else 0
                    yield answer

    def _remembered_or_given_up(self, question: Question[T]) -> T | Failure:
        known = self._remembered(question)
        reason = f"not asked, because {FAILURES_IN_A_ROW} questions in a row had no answer"
        return Failure(reason=reason, final=True) if known is None else known[0]

    def _one(self, question: Question[T]) -> tuple[T | Failure, bool]:
        """Return an answer, and whether it was remembered."""
        known = self._remembered(question)
        return (self._anew(question), False) if known is None else (known[0], True)

    def _anew(self, question: Question[T]) -> T | Failure:
        said = ""
        for _ in range(1 + min(1, self.config.judge_retries)):
            try:
                said = self._say(question)
            except _Unanswered as error:
                return Failure(reason=str(error), final=error.final)
            try:
                answer = question.read(said)
            except (ValueError, RecursionError):
                continue
            path = self._path(question)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json_atomically(path, {**self._request(question), "url": self.endpoint.url, "answer": said})
            return answer
        return Failure(reason=f"answered what is no answer: {_shown(said)}", final=False)

    def _say(self, question: Question[Any]) -> str:
        """Return an answer's text; the client itself asks again where the endpoint is down, slow or busy."""
        import openai

        options: dict[str, Any] = {"max_tokens": question.longest, "temperature": 0.0}
        for _ in range(3):
            try:
                request: dict[str, Any] = {**self._request(question), **options}
                return self._without_key(_content(self._client.chat.completions.create(**request)))
            except openai.BadRequestError as error:
                # Some models take no temperature, some call the limit by its newer name: they say so.
                told = self._without_key(str(error))
                if "max_completion_tokens" in told and "max_tokens" in options:
                    options["max_completion_tokens"] = options.pop("max_tokens")
                elif "temperature" in told and "temperature" in options:
                    del options["temperature"]
                else:
                    # It is there, and this question is what it does not take: too long, or filtered.
                    raise _Unanswered(f"refused the question: {_shown(told)}", final=False) from error
            except openai.APITimeoutError as error:
                raise _Unanswered(f"did not answer within {self.config.judge_timeout:g} s") from error
            except openai.RateLimitError as error:
                raise _Unanswered("has too many requests already; ask again later") from error
            except openai.APIConnectionError as error:
                raise _Unanswered("could not be reached") from error
            except openai.APIStatusError as error:
                told = _shown(self._without_key(str(error)))
                raise _Unanswered(f"answered with HTTP status {error.status_code}: {told}") from error
            except (openai.OpenAIError, ValueError, RecursionError) as error:
                raise _Unanswered(f"answered no chat completion ({type(error).__name__})") from error
        raise _Unanswered("refused the question", final=False)

    def _without_key(self, text: str) -> str:
        """Return what an endpoint said, which may repeat what it was sent, as it can be shown and kept."""
        return text.replace(self._key, "…") if self._key and len(self._key) >= _SHORTEST_KEY else text

    def _request(self, question: Question[Any]) -> dict[str, object]:
        messages = [{"role": "system", "content": question.system}, {"role": "user", "content": question.user}]
        return {"model": self.endpoint.model, "messages": messages}

    def _path(self, question: Question[Any]) -> Path:
        content = {**self._request(question), "url": self.endpoint.url, "longest": question.longest}
        return self.cache / f"{hashlib.sha256(canonical_json(content).encode()).hexdigest()}.json"

    def _remembered(self, question: Question[T]) -> tuple[T] | None:
        try:
            content: object = json.loads(self._path(question).read_text(encoding="utf-8"))
            return (question.read(str(cast("Mapping[str, object]", content)["answer"])),)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None


class _Unanswered(Exception):
    """A question was not answered, for this reason."""

    def __init__(self, reason: str, *, final: bool = True) -> None:
        super().__init__(reason)
        self.final = final


def require_endpoint(endpoint: Endpoint, variable: str = KEY_VARIABLE) -> None:
    """Check that an endpoint can be asked.

    Args:
        endpoint: Who is asked.
        variable: The variable of the environment that may hold its key.

    Raises:
        ValueError: If its URL is none of an endpoint, it has no model, or its key would travel unencrypted.
    """
    try:
        parts = urlsplit(endpoint.url)
        is_base = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        raise ValueError(f"A judge's URL must be one; {_shown(endpoint.url)} is not.") from None
    if not is_base or parts.query or parts.fragment:
        raise ValueError(
            f"A judge's URL must be the base of an API, such as http://localhost:8000/v1; got {_shown(endpoint.url)}."
        )
    if parts.username or parts.password:
        raise ValueError(f"A judge's URL must not hold a name or password; set {variable} in the environment.")
    if not endpoint.model:
        raise ValueError("A judge must have a model; got an empty name. Name one that the endpoint has.")
    if parts.scheme == "http" and parts.hostname not in _LOOPBACK and _key(endpoint, variable):
        raise ValueError(
            f"A key must travel encrypted; {parts.hostname} is asked over http, and {variable} is set. "
            "Use https, or unset it."
        )


def _server(url: str) -> tuple[str, str | None, int | None]:
    """Return what tells servers apart; what is no URL is refused elsewhere, and a server by itself."""
    try:
        parts = urlsplit(url)
        return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        return url, None, None


def _is_openai(endpoint: Endpoint) -> bool:
    return urlsplit(endpoint.url).hostname == OPENAI_HOST


def _key(endpoint: Endpoint, variable: str) -> str | None:
    own = os.environ.get(variable)
    return os.environ.get(OPENAI_VARIABLE) if not own and _is_openai(endpoint) else own


def _client(endpoint: Endpoint, config: JudgeConfig, key: str | None) -> "openai.OpenAI":
    try:
        import openai
    except ImportError as error:
        raise ValueError(
            "A judge needs the package openai; it is not installed. Install it with pip install mxd[judge]."
        ) from error
    client = openai.OpenAI(
        base_url=endpoint.url,
        # Servers of one's own want none, and the client refuses to go without.
        api_key=key or "none",
        timeout=config.judge_timeout,
        max_retries=config.judge_retries,
    )
    if not _is_openai(endpoint):
        # The client takes all three from the environment, and would tell them to any server.
        client.organization = client.project = None
        client._custom_headers = {}  # pyright: ignore[reportPrivateUsage]  # it has no other way
    return client


def _content(completion: object) -> str:
    """Return the text of a chat completion, which may be anything that an endpoint made up.

    Raises:
        ValueError: If there is none.
    """
    try:
        said: object = cast(Any, completion).choices[0].message.content
    except (AttributeError, IndexError, TypeError) as error:
        raise ValueError("no choices") from error
    if said is None:
        # So a filter of content answers, or a model that thought until it was cut off.
        raise _Unanswered("answered without a text", final=False)
    if not isinstance(said, str):
        raise ValueError("no text")
    # JSON can hold half a character, and no file can.
    return said.encode("utf-8", "replace").decode("utf-8")


def _shown(text: str) -> str:
    line = " ".join(text.split())
    printable = "".join(character if character.isprintable() else "?" for character in line)
    return repr(printable if len(printable) <= _SHOWN else printable[:_SHOWN] + " …")
