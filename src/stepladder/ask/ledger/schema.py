"""The tables of the ledger.

requests   identity by key; a request is written once, when it is first asked
responses  what serves it: one row per cap under which an answer came
attempts   every time a request was sent, with what was reserved, what it cost, and the bytes that came back
batches    files of requests handed to a provider's batch API; ``intent`` is what finds one again after a crash
sessions   processes that send; which of them still live says which open attempts can still be answered
hits       how often a run was served from here
"""

MIGRATIONS = (
    """
    CREATE TABLE requests (
        key TEXT PRIMARY KEY,
        identity TEXT NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE responses (
        key TEXT NOT NULL REFERENCES requests (key),
        max_tokens INTEGER NOT NULL,
        run TEXT NOT NULL,
        text TEXT NOT NULL,
        finished INTEGER NOT NULL,
        prompt_tokens INTEGER NOT NULL,
        completion_tokens INTEGER NOT NULL,
        micro_dollars INTEGER NOT NULL,
        PRIMARY KEY (key, max_tokens)
    ) WITHOUT ROWID;
    """,
    """
    ALTER TABLE responses ADD COLUMN finish TEXT NOT NULL DEFAULT 'stop';
    ALTER TABLE responses ADD COLUMN reasoning TEXT NOT NULL DEFAULT '';
    ALTER TABLE responses ADD COLUMN attempt INTEGER REFERENCES attempts (id);
    UPDATE responses SET finish = 'length' WHERE NOT finished;
    CREATE TABLE sessions (
        id INTEGER PRIMARY KEY,
        pid INTEGER NOT NULL,
        started REAL NOT NULL
    );
    CREATE TABLE attempts (
        id INTEGER PRIMARY KEY,
        key TEXT NOT NULL REFERENCES requests (key),
        session INTEGER NOT NULL REFERENCES sessions (id),
        run TEXT NOT NULL,
        rung TEXT NOT NULL,
        model TEXT NOT NULL,
        endpoint TEXT NOT NULL DEFAULT '',
        max_tokens INTEGER NOT NULL,
        reserved INTEGER NOT NULL,
        charged INTEGER,
        outcome TEXT,
        status INTEGER,
        message TEXT NOT NULL DEFAULT '',
        started REAL NOT NULL,
        seconds REAL,
        prompt_tokens INTEGER NOT NULL DEFAULT 0,
        completion_tokens INTEGER NOT NULL DEFAULT 0,
        raw BLOB
    );
    CREATE TABLE hits (
        run TEXT NOT NULL,
        rung TEXT NOT NULL,
        model TEXT NOT NULL,
        count INTEGER NOT NULL,
        PRIMARY KEY (run, rung, model)
    ) WITHOUT ROWID;
    CREATE INDEX attempts_key ON attempts (key, outcome);
    CREATE INDEX attempts_spent ON attempts (run, rung, COALESCE(charged, reserved));
    """,
    """
    ALTER TABLE responses ADD COLUMN logprobs TEXT NOT NULL DEFAULT '';
    CREATE TABLE batches (
        id INTEGER PRIMARY KEY,
        intent TEXT NOT NULL UNIQUE,
        session INTEGER NOT NULL REFERENCES sessions (id),
        run TEXT NOT NULL,
        rung TEXT NOT NULL,
        endpoint TEXT NOT NULL,
        account TEXT NOT NULL,
        price TEXT NOT NULL,
        remote TEXT,
        created REAL NOT NULL,
        ended TEXT,
        stray BLOB
    );
    ALTER TABLE attempts ADD COLUMN batch INTEGER REFERENCES batches (id);
    CREATE INDEX attempts_batch ON attempts (batch) WHERE batch IS NOT NULL;
    """,
)
"""Append-only: a migration that has shipped is never edited; ``PRAGMA user_version`` counts those applied."""
