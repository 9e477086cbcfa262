"""What the two ends of a Kafka log share: the client's settings, and what becomes of its errors.

In: an address and options. Out: settings for librdkafka, and `Broker`, which asks and asks again while a broker is away. Errors
that pass by themselves (no connection, a new leader, a timeout) are kept for the text of a later error; those that do not (a
refused login, TLS that does not match, an unknown topic) become ValueErrors. What librdkafka has to say goes to the logger
`monolith_jax.kafka`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

try:
    from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
    from confluent_kafka.admin import AdminClient
    from confluent_kafka.cimpl import NewTopic
except ImportError as error:
    raise ImportError("a log at kafka:// needs the extra `kafka`: pip install 'monolith_jax[kafka]'") from error

__all__ = ["AdminClient", "Broker", "Consumer", "KafkaError", "KafkaException", "NewTopic", "Producer", "TopicPartition"]

LOGGER = logging.getLogger("monolith_jax.kafka")
LOGGER.addHandler(logging.NullHandler())  # else Python prints its warnings where nothing is set up
PATIENCE_S = 30.0
"""A question is asked again for so long while no broker answers."""
_FIRST_S, _LONGEST_S = 0.5, 10.0  # a question may take this long: the first times little, for errors to be seen soon
_PAUSE_S = 0.1
Answer = TypeVar("Answer")
# By name: an error that a version of the client does not know is none that it gives.
_UNKNOWN = ("UNKNOWN_TOPIC_OR_PART", "_UNKNOWN_TOPIC", "_UNKNOWN_PARTITION", "UNKNOWN_TOPIC_ID")
_REFUSALS = (
    *("_AUTHENTICATION", "SASL_AUTHENTICATION_FAILED", "UNSUPPORTED_SASL_MECHANISM", "ILLEGAL_SASL_STATE"),
    *("TOPIC_AUTHORIZATION_FAILED", "CLUSTER_AUTHORIZATION_FAILED", "TRANSACTIONAL_ID_AUTHORIZATION_FAILED"),
    *("INVALID_TOPIC_EXCEPTION", "TOPIC_EXCEPTION", "INVALID_REPLICATION_FACTOR", "INVALID_PARTITIONS", "POLICY_VIOLATION"),
    *("_INVALID_ARG", "_UNSUPPORTED_FEATURE", "UNSUPPORTED_VERSION", "INVALID_CONFIG"),
)


def _codes(names: Sequence[str]) -> frozenset[int]:
    return frozenset(getattr(KafkaError, name) for name in names if hasattr(KafkaError, name))


UNKNOWN = _codes(_UNKNOWN)
REFUSALS = _codes(_REFUSALS)


def settings_of(
    url: str, options: Mapping[str, str] | Sequence[tuple[str, str]], defaults: Mapping[str, str], fixed: Mapping[str, str]
) -> dict[str, Any]:
    """Returns the client's settings: `defaults`, over them the options, over them what is `fixed`.

    Raises:
        ValueError: The address names no broker, or an option is one that is fixed.
    """
    kind, _, brokers = url.partition("://")
    if kind != "kafka" or not brokers or "/" in brokers:
        raise ValueError(f"{url!r} names no broker; write kafka://host:port,host:port")
    given = dict(options)
    if wrong := given.keys() & {"bootstrap.servers", *fixed}:
        raise ValueError(
            f"options {', '.join(sorted(wrong))} of {url} cannot be set: reading and appending rely on their values"
        )
    return {**defaults, **given, **fixed, "bootstrap.servers": brokers}


class Broker:
    """Speaks to the brokers of an address, and keeps what they and the client complain about."""

    def __init__(self, url: str) -> None:
        """Connects to nothing yet."""
        self.url = url
        self.last = ""
        """The last error that passes by itself."""
        self.refused = ""
        """The error that does not, '' while there is none."""
        self.answered = False
        """Whether a broker has ever answered."""

    def make(self, kind: Callable[..., Answer], settings: Mapping[str, Any]) -> Answer:
        """Returns a client.

        Raises:
            ValueError: A setting is not understood.
        """
        try:
            return kind({**settings, "error_cb": self.hear}, logger=LOGGER)
        except KafkaException as error:
            raise ValueError(
                f"{self.url}: {error.args[0].str()}. Options have the names and values that librdkafka's CONFIGURATION.md lists"
            ) from None

    def hear(self, error: KafkaError) -> None:
        """Keeps an error."""
        if error.code() != KafkaError._ALL_BROKERS_DOWN or not self.last:  # which says less than what came before it
            self.last = error.str()
        # A broker that has answered may break off a handshake as it ends; one that never has does not speak TLS with us.
        no_tls = not self.answered and (error.code() == KafkaError._SSL or "SSL handshake failed" in error.str())
        if error.fatal() or error.code() in REFUSALS or no_tls:
            self.refused = error.str()

    def check(self) -> None:
        """Passes on a refusal.

        Raises:
            ValueError: A broker refused, or the client cannot go on.
        """
        if self.refused:
            raise ValueError(
                f"{self.url} refuses: {self.refused}. Look at the options of the log (security.protocol, sasl.*, ssl.*) and at "
                "what the broker allows"
            )

    def ask(
        self, what: str, question: Callable[[float], Answer], serve: Callable[[], object], within_s: float = PATIENCE_S
    ) -> Answer:
        """Returns the answer to a question; asks again while no broker answers, for `within_s` at most.

        Args:
            what: What is asked about, for errors.
            question: Called with seconds to wait.
            serve: Lets the client deliver errors.
            within_s: Seconds.

        Raises:
            ValueError: There is no such topic or partition, or a broker refuses.
            OSError: No broker has answered.
        """
        until = time.monotonic() + within_s
        patience_s = _FIRST_S
        while True:
            try:
                answer = question(max(_PAUSE_S, min(patience_s, until - time.monotonic())))
            except KafkaException as error:
                fault = error.args[0]
                # A broker that comes back does not know its topics at once.
                if fault.code() in UNKNOWN and not self.last:
                    raise ValueError(
                        f"{self.url} has no {what}. A producer's `create` makes a topic; or look at the name"
                    ) from None
                self.last = fault.str() if not self.last or fault.code() != KafkaError._TRANSPORT else self.last
                if fault.code() in REFUSALS:
                    self.refused = f"{what}: {fault.str()}"
                serve()
                self.check()
                if time.monotonic() >= until:
                    raise OSError(
                        f"{self.url} has not answered for {within_s:.0f} s, asked about {what}: {self.last}"
                    ) from None
                time.sleep(_PAUSE_S)
                patience_s = min(2 * patience_s, _LONGEST_S)
            else:
                self.answered = True
                return answer
