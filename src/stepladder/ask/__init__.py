"""How any model is asked, teacher or student: identity, ledger, engine. Pay, persist, parse."""
