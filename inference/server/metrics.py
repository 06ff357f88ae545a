"""What `/metrics` shows, for Prometheus. Nothing in it comes from what a user wrote."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from inference.request import Sequence

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    def __init__(self):
        # Its own registry: several apps in one process, as in tests, don't meet.
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        own = {"registry": self.registry}
        self.requests = Counter("cinego_requests", "answered requests", ["status"], **own)
        self.left = Counter("cinego_clients_left", "clients that hung up on their answer", **own)
        self.media = Counter("cinego_media", "videos and images, by outcome", ["outcome"], **own)
        self.tokens = Counter("cinego_tokens", "tokens read and written", ["kind"], **own)
        self.seconds = Histogram("cinego_request_seconds", "whole request", buckets=SECONDS, **own)
        self.first_token = Histogram(
            "cinego_first_token_seconds", "waiting, tower, prompt", buckets=SECONDS, **own
        )
        self.batch_size = Histogram(
            "cinego_batch_size", "rows of one step", buckets=(1, 2, 4, 8, 16, 32, 64), **own
        )
        self.batch_rows = Gauge("cinego_batch_rows", "unfinished answers", **own)
        self.in_flight = Gauge("cinego_in_flight", "requests admitted and not yet ended", **own)

    def count_step(self, sequences: list[Sequence]) -> None:
        """Called by the scheduler with the sequences that took part in a step."""
        self.batch_size.observe(len(sequences))
        for sequence in sequences:
            if sequence.completion_tokens == 1:
                self.first_token.observe(sequence.seconds)
            if sequence.finish_reason is not None:
                self.tokens.labels("prompt").inc(sequence.prompt_tokens)
                self.tokens.labels("completion").inc(sequence.completion_tokens)
