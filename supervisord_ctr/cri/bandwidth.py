"""Bandwidth limits of pods: the annotations that Kubernetes has for them, as the CNI capability has it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation

from supervisord_ctr.errors import InvalidArgument

_INGRESS = "kubernetes.io/ingress-bandwidth"
_EGRESS = "kubernetes.io/egress-bandwidth"
_QUANTITY = re.compile(r"([+-]?[0-9]*\.?[0-9]*)(?:([eE][+-]?[0-9]+)|(Ki|Mi|Gi|Ti|Pi|Ei|[numkMGTPE]))?\Z")
_SUFFIX = {
    "n": Decimal("1e-9"), "u": Decimal("1e-6"), "m": Decimal("1e-3"), "k": Decimal(10**3), "M": Decimal(10**6),
    "G": Decimal(10**9), "T": Decimal(10**12), "P": Decimal(10**15), "E": Decimal(10**18), "Ki": Decimal(1 << 10),
    "Mi": Decimal(1 << 20), "Gi": Decimal(1 << 30), "Ti": Decimal(1 << 40), "Pi": Decimal(1 << 50),
    "Ei": Decimal(1 << 60),
}
_MINIMUM, _MAXIMUM = Decimal(1000), Decimal(10**15)
_BURST = (1 << 32) - 1


def parse_quantity(text: str) -> Decimal:
    """A Kubernetes quantity ("10M", "1.5Gi", "2e6"); raises `InvalidArgument`."""
    match = _QUANTITY.match(text.strip())
    try:
        if match is None:
            raise InvalidOperation
        number = Decimal(match[1] + (match[2] or ""))
    except InvalidOperation:
        raise InvalidArgument(f"quantity {text!r} is not valid", kind="quantity", key=text) from None
    return number * _SUFFIX.get(match[3] or "", Decimal(1))


def of_annotations(annotations: Mapping[str, str]) -> dict[str, int]:
    """The `bandwidth` capability in bits a second, {} without limits; raises `InvalidArgument`."""
    found: dict[str, int] = {}
    for key, word in ((_INGRESS, "ingress"), (_EGRESS, "egress")):
        if key not in annotations:
            continue
        value = parse_quantity(annotations[key])
        if not _MINIMUM <= value <= _MAXIMUM:
            raise InvalidArgument(
                f"annotation {key}={annotations[key]}: the limit must be between 1k and 1P", kind="annotation", key=key
            )
        found[f"{word}Rate"], found[f"{word}Burst"] = int(value), _BURST
    return found
