"""``serve.proof:`` what must be shown of a served model before it gets traffic."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from toolkit.recipe.base import Section


class ProofSection(Section):
    """Run on every engine start and on every adapter that is loaded, before `/readyz` says yes."""

    tolerance: Annotated[float, Field(gt=0)] | None = None
    """Largest mean difference of logprobs (nats per token) from the training side; by precision unless given."""
    agreement: Literal["required", "if_stored"] = "if_stored"
    """`required` refuses an adapter that brings no stored logprobs of the training side."""
    warm_up: bool = True
    """Ask every adapter at short and long prompts before traffic comes."""
    may_differ: tuple[str, ...] = ()
    """Stored conversations whose tokens may differ from the training path (`tools`, `tool result`, ...): an engine that
    renders something otherwise which no client of yours sends. The certificate names them."""
