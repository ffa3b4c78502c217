-- Users, logins, tokens, settings, images, guests, disks, tasks and the audit trail.

CREATE TABLE users (
    id            TEXT PRIMARY KEY NOT NULL CHECK (length(id) = 8),
    name          TEXT NOT NULL UNIQUE CHECK (length(name) BETWEEN 1 AND 63),
    role          TEXT NOT NULL CHECK (role IN ('administrator', 'operator', 'viewer')),
    password_hash TEXT NOT NULL,
    created_ms    INTEGER NOT NULL,
    last_login_ms INTEGER
) STRICT;

CREATE TABLE logins (
    id         TEXT PRIMARY KEY NOT NULL CHECK (length(id) = 8),
    token_hash BLOB NOT NULL UNIQUE CHECK (length(token_hash) = 32),
    user_id    TEXT NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    address    TEXT NOT NULL,
    created_ms INTEGER NOT NULL,
    used_ms    INTEGER NOT NULL
) STRICT;
CREATE INDEX logins_by_user ON logins (user_id);

CREATE TABLE tokens (
    id         TEXT PRIMARY KEY NOT NULL CHECK (length(id) = 8),
    token_hash BLOB NOT NULL UNIQUE CHECK (length(token_hash) = 32),
    user_id    TEXT NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    name       TEXT NOT NULL CHECK (length(name) BETWEEN 1 AND 63),
    created_ms INTEGER NOT NULL,
    used_ms    INTEGER,
    UNIQUE (user_id, name)
) STRICT;

CREATE TABLE settings (
    name  TEXT PRIMARY KEY NOT NULL,
    value TEXT NOT NULL
) STRICT;

-- A library image is images/ID.raw in the state directory; one with host_path stays where it is.
CREATE TABLE images (
    id         TEXT PRIMARY KEY NOT NULL CHECK (length(id) = 8),
    name       TEXT NOT NULL UNIQUE CHECK (length(name) BETWEEN 1 AND 63),
    kind       TEXT NOT NULL CHECK (kind IN ('iso', 'disk', 'kernel', 'initrd', 'other')),
    state      TEXT NOT NULL CHECK (state IN ('uploading', 'ready')),
    size_bytes INTEGER NOT NULL CHECK (size_bytes >= 0),
    sha256     TEXT CHECK (length(sha256) = 64),
    source     TEXT NOT NULL,
    host_path  TEXT UNIQUE CHECK (host_path LIKE '/%'),
    task_id    TEXT,
    created_ms INTEGER NOT NULL,
    CHECK (state <> 'ready' OR size_bytes > 0)
) STRICT;

CREATE TABLE guests (
    id              TEXT PRIMARY KEY NOT NULL CHECK (length(id) = 8),
    name            TEXT NOT NULL UNIQUE CHECK (length(name) BETWEEN 1 AND 63),
    machine         TEXT NOT NULL,
    desired         TEXT NOT NULL CHECK (desired IN ('on', 'off')),
    note            TEXT NOT NULL DEFAULT '',
    cpus            INTEGER NOT NULL CHECK (cpus BETWEEN 1 AND 64),
    memory_bytes    INTEGER NOT NULL CHECK (memory_bytes > 0),
    boot            TEXT NOT NULL CHECK (boot IN ('bios', 'uefi', 'kernel', 'test')),
    kernel_image_id TEXT REFERENCES images (id),
    initrd_image_id TEXT REFERENCES images (id),
    cmdline         TEXT NOT NULL DEFAULT '',
    cd_image_id     TEXT REFERENCES images (id),
    network         TEXT NOT NULL CHECK (network IN ('none', 'nat', 'user', 'bridge')),
    bridge          TEXT CHECK (length(bridge) BETWEEN 1 AND 15),
    mac             TEXT NOT NULL UNIQUE CHECK (length(mac) = 17),
    -- Why it failed last, for its page; gone at the next start.
    failure         TEXT,
    created_ms      INTEGER NOT NULL,
    CHECK ((boot = 'kernel') = (kernel_image_id IS NOT NULL)),
    CHECK ((network = 'bridge') = (bridge IS NOT NULL))
) STRICT;

-- A disk is disks/ID.raw in the state directory, or the host file of the image it names.
CREATE TABLE disks (
    id         TEXT PRIMARY KEY NOT NULL CHECK (length(id) = 8),
    guest_id   TEXT NOT NULL REFERENCES guests (id),
    position   INTEGER NOT NULL CHECK (position >= 0),
    bus        TEXT NOT NULL CHECK (bus IN ('virtio', 'ahci')),
    size_bytes INTEGER NOT NULL CHECK (size_bytes > 0),
    image_id   TEXT REFERENCES images (id),
    read_only  INTEGER NOT NULL DEFAULT 0 CHECK (read_only IN (0, 1)),
    -- Its file is complete; not yet while an image is being copied into it.
    ready      INTEGER NOT NULL DEFAULT 1 CHECK (ready IN (0, 1)),
    created_ms INTEGER NOT NULL,
    UNIQUE (guest_id, position)
) STRICT;

CREATE TABLE tasks (
    id         TEXT PRIMARY KEY NOT NULL CHECK (length(id) = 8),
    kind       TEXT NOT NULL,
    title      TEXT NOT NULL,
    subject    TEXT NOT NULL,
    who        TEXT NOT NULL,
    state      TEXT NOT NULL CHECK (state IN ('running', 'done', 'failed', 'cancelled', 'interrupted')),
    step       TEXT NOT NULL DEFAULT '',
    done       INTEGER NOT NULL DEFAULT 0 CHECK (done >= 0),
    total      INTEGER CHECK (total >= 0),
    started_ms INTEGER NOT NULL,
    ended_ms   INTEGER,
    error      TEXT,
    CHECK ((state = 'running') = (ended_ms IS NULL))
) STRICT;
CREATE INDEX tasks_by_start ON tasks (started_ms);

CREATE TABLE task_log (
    task_id TEXT NOT NULL REFERENCES tasks (id) ON DELETE CASCADE,
    at_ms   INTEGER NOT NULL,
    text    TEXT NOT NULL
) STRICT;
CREATE INDEX task_log_by_task ON task_log (task_id);

CREATE TABLE audit (
    id      INTEGER PRIMARY KEY AUTOINCREMENT,
    at_ms   INTEGER NOT NULL,
    who     TEXT NOT NULL,
    address TEXT NOT NULL,
    action  TEXT NOT NULL,
    subject TEXT NOT NULL,
    detail  TEXT NOT NULL
) STRICT;
