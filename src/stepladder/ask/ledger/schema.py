"""The tables of the ledger.

requests   identity by key, written when a request is first sent; the others name it by its number, so that only the
           index of keys, which are random, is written to all over the file
responses  responses to a request, one row per ``max_tokens``
attempts   every time a request was sent: what was reserved, what was charged, and the raw response, compressed in
           ``body`` (packing.py); older versions left it as it came in ``raw``
totals     sums over attempts by account and outcome ('': none yet), and
durations  how many attempts took so long (three significant digits), and
answers    how many responses each run added; triggers keep these three, since attempts may be millions
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
    """
    ALTER TABLE attempts ADD COLUMN body BLOB;
    CREATE TABLE totals (
        run TEXT NOT NULL,
        rung TEXT NOT NULL,
        model TEXT NOT NULL,
        outcome TEXT NOT NULL,
        attempts INTEGER NOT NULL,
        micro_dollars INTEGER NOT NULL,
        prompt_tokens INTEGER NOT NULL,
        completion_tokens INTEGER NOT NULL,
        PRIMARY KEY (run, rung, model, outcome)
    ) WITHOUT ROWID;
    CREATE TABLE durations (
        run TEXT NOT NULL,
        rung TEXT NOT NULL,
        model TEXT NOT NULL,
        seconds REAL NOT NULL,
        attempts INTEGER NOT NULL,
        PRIMARY KEY (run, rung, model, seconds)
    ) WITHOUT ROWID;
    CREATE TABLE answers (
        run TEXT PRIMARY KEY,
        responses INTEGER NOT NULL
    ) WITHOUT ROWID;
    INSERT INTO totals
        SELECT run, rung, model, COALESCE(outcome, ''), COUNT(*), SUM(COALESCE(charged, reserved)),
            SUM(prompt_tokens), SUM(completion_tokens)
        FROM attempts GROUP BY 1, 2, 3, 4;
    INSERT INTO durations
        SELECT run, rung, model, CAST(PRINTF('%.2e', seconds) AS REAL), COUNT(*)
        FROM attempts WHERE seconds IS NOT NULL GROUP BY 1, 2, 3, 4;
    INSERT INTO answers SELECT run, COUNT(*) FROM responses GROUP BY 1;
    CREATE TRIGGER attempt_opened AFTER INSERT ON attempts BEGIN
        INSERT INTO totals VALUES (NEW.run, NEW.rung, NEW.model, '', 1, NEW.reserved, 0, 0)
            ON CONFLICT DO UPDATE SET
                attempts = attempts + 1, micro_dollars = micro_dollars + excluded.micro_dollars;
    END;
    CREATE TRIGGER attempt_settled AFTER UPDATE OF outcome ON attempts BEGIN
        UPDATE totals SET
            attempts = attempts - 1, micro_dollars = micro_dollars - COALESCE(OLD.charged, OLD.reserved),
            prompt_tokens = prompt_tokens - OLD.prompt_tokens,
            completion_tokens = completion_tokens - OLD.completion_tokens
            WHERE (run, rung, model, outcome) = (OLD.run, OLD.rung, OLD.model, COALESCE(OLD.outcome, ''));
        INSERT INTO totals
            VALUES (NEW.run, NEW.rung, NEW.model, COALESCE(NEW.outcome, ''), 1, COALESCE(NEW.charged, NEW.reserved),
                NEW.prompt_tokens, NEW.completion_tokens)
            ON CONFLICT DO UPDATE SET
                attempts = attempts + 1, micro_dollars = micro_dollars + excluded.micro_dollars,
                prompt_tokens = prompt_tokens + excluded.prompt_tokens,
                completion_tokens = completion_tokens + excluded.completion_tokens;
    END;
    CREATE TRIGGER attempt_timed AFTER UPDATE OF outcome ON attempts
        WHEN OLD.outcome IS NULL AND NEW.seconds IS NOT NULL BEGIN
        INSERT INTO durations VALUES (NEW.run, NEW.rung, NEW.model, CAST(PRINTF('%.2e', NEW.seconds) AS REAL), 1)
            ON CONFLICT DO UPDATE SET attempts = attempts + 1;
    END;
    CREATE TRIGGER response_added AFTER INSERT ON responses BEGIN
        INSERT OR IGNORE INTO answers VALUES (NEW.run, 0);
        UPDATE answers SET responses = responses + 1 WHERE run = NEW.run;
    END;
    DROP INDEX attempts_spent;
    CREATE INDEX attempts_open ON attempts (run) WHERE outcome IS NULL;
    """,
    """
    ALTER TABLE requests RENAME TO requests_by_key;
    ALTER TABLE responses RENAME TO responses_by_key;
    ALTER TABLE attempts RENAME TO attempts_by_key;
    CREATE TABLE requests (
        id INTEGER PRIMARY KEY,
        key TEXT NOT NULL UNIQUE,
        identity TEXT NOT NULL
    );
    CREATE TABLE responses (
        id INTEGER PRIMARY KEY,
        request INTEGER NOT NULL REFERENCES requests (id),
        max_tokens INTEGER NOT NULL,
        run TEXT NOT NULL,
        text TEXT NOT NULL,
        finish TEXT NOT NULL,
        reasoning TEXT NOT NULL,
        logprobs TEXT NOT NULL,
        prompt_tokens INTEGER NOT NULL,
        completion_tokens INTEGER NOT NULL,
        micro_dollars INTEGER NOT NULL,
        attempt INTEGER REFERENCES attempts (id),
        checksum TEXT NOT NULL,
        UNIQUE (request, max_tokens)
    );
    CREATE TABLE attempts (
        id INTEGER PRIMARY KEY,
        request INTEGER NOT NULL REFERENCES requests (id),
        session INTEGER NOT NULL REFERENCES sessions (id),
        run TEXT NOT NULL,
        rung TEXT NOT NULL,
        model TEXT NOT NULL,
        endpoint TEXT NOT NULL,
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
        batch INTEGER REFERENCES batches (id),
        raw BLOB,
        body BLOB
    );
    INSERT INTO requests (key, identity) SELECT key, identity FROM requests_by_key;
    INSERT INTO responses (request, max_tokens, run, text, finish, reasoning, logprobs, prompt_tokens,
            completion_tokens, micro_dollars, attempt, checksum)
        SELECT requests.id, max_tokens, run, text, finish, reasoning, logprobs, prompt_tokens, completion_tokens,
            micro_dollars, attempt, checksum
        FROM responses_by_key JOIN requests USING (key);
    INSERT INTO attempts
        SELECT attempts_by_key.id, requests.id, session, run, rung, model, endpoint, max_tokens, reserved, charged,
            outcome, status, message, started, seconds, prompt_tokens, completion_tokens, batch, raw, body
        FROM attempts_by_key JOIN requests USING (key);
    DROP TABLE responses_by_key;
    DROP TABLE attempts_by_key;
    DROP TABLE requests_by_key;
    CREATE INDEX attempts_request ON attempts (request);
    CREATE INDEX attempts_open ON attempts (run) WHERE outcome IS NULL;
    CREATE INDEX attempts_batch ON attempts (batch) WHERE batch IS NOT NULL;
    CREATE TRIGGER attempt_opened AFTER INSERT ON attempts BEGIN
        INSERT INTO totals VALUES (NEW.run, NEW.rung, NEW.model, '', 1, NEW.reserved, 0, 0)
            ON CONFLICT DO UPDATE SET
                attempts = attempts + 1, micro_dollars = micro_dollars + excluded.micro_dollars;
    END;
    CREATE TRIGGER attempt_settled AFTER UPDATE OF outcome ON attempts BEGIN
        UPDATE totals SET
            attempts = attempts - 1, micro_dollars = micro_dollars - COALESCE(OLD.charged, OLD.reserved),
            prompt_tokens = prompt_tokens - OLD.prompt_tokens,
            completion_tokens = completion_tokens - OLD.completion_tokens
            WHERE (run, rung, model, outcome) = (OLD.run, OLD.rung, OLD.model, COALESCE(OLD.outcome, ''));
        INSERT INTO totals
            VALUES (NEW.run, NEW.rung, NEW.model, COALESCE(NEW.outcome, ''), 1, COALESCE(NEW.charged, NEW.reserved),
                NEW.prompt_tokens, NEW.completion_tokens)
            ON CONFLICT DO UPDATE SET
                attempts = attempts + 1, micro_dollars = micro_dollars + excluded.micro_dollars,
                prompt_tokens = prompt_tokens + excluded.prompt_tokens,
                completion_tokens = completion_tokens + excluded.completion_tokens;
    END;
    CREATE TRIGGER attempt_timed AFTER UPDATE OF outcome ON attempts
        WHEN OLD.outcome IS NULL AND NEW.seconds IS NOT NULL BEGIN
        INSERT INTO durations VALUES (NEW.run, NEW.rung, NEW.model, CAST(PRINTF('%.2e', NEW.seconds) AS REAL), 1)
            ON CONFLICT DO UPDATE SET attempts = attempts + 1;
    END;
    CREATE TRIGGER response_added AFTER INSERT ON responses BEGIN
        INSERT OR IGNORE INTO answers VALUES (NEW.run, 0);
        UPDATE answers SET responses = responses + 1 WHERE run = NEW.run;
    END;
    """,
)
"""Append-only: a migration that has shipped is never edited; ``PRAGMA user_version`` counts those applied."""
APPLICATION_ID = 0x53544C44
"""``PRAGMA application_id`` of a ledger ("STLD"); 0 in those of older versions."""
