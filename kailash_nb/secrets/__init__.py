"""Secrets: kept encrypted in a file of the user's, bound to what they may be used for, and hidden from what is shown.

``manager`` keeps them, ``contents`` is what lies in the file, ``encryption`` how it is encrypted, ``keys`` where the
key comes from, and ``redaction`` takes values out of text.
"""

from __future__ import annotations

from .contents import Binding, SecretInfo
from .keys import KeyProvider
from .manager import SecretManager
from .redaction import Redactor

__all__ = ["Binding", "KeyProvider", "Redactor", "SecretInfo", "SecretManager"]
