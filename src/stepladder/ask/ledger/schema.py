"""The tables of the ledger.

requests   identity by key, written when a request is first sent
responses  responses to a request, one row per ``max_tokens``
attempts   every time a request was sent: what was reserved, what was charged, and the raw response
batches    files of requests sent to a provider's batch API; ``intent`` identifies one again after a crash
sessions   processes that send requests; an open attempt can still be settled while its process runs
hits       how many of a run's requests were answered from the ledger
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
    """
    ALTER TABLE responses ADD COLUMN checksum TEXT NOT NULL DEFAULT '';
    """,
)
"""Append-only: a migration that has shipped is never edited; ``PRAGMA user_version`` counts those applied."""
APPLICATION_ID = 0x53544C44
"""``PRAGMA application_id`` of a ledger ("STLD"); 0 in those of older versions."""
