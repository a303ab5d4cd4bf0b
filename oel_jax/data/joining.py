"""Puts conversations together that were logged piece by piece.

Each request of a chat repeats the conversation so far, so a log holds a conversation of n turns n
times, each time one turn longer; a store holds it exchange by exchange. `Joiner` takes the pieces
in any order and gives whole conversations, every answer once. A piece continues another if it names
it as its parent, or if it begins with the same messages and the same answer (of the same user,
conversation and tools). Where two pieces continue the same answer, as after a regenerated one, the
first makes the conversation longer; the second becomes a conversation whose first turn reads all
that came before, so that no answer is there twice.

Memory is bounded, whatever the number of conversations: what is known is in a temporary SQLite
database on disk (the directory for temporary files; gone with the process), of which at most
`CACHE_KIB` are held in memory. Imports no JAX.
"""

import hashlib
import json
import os
import sqlite3
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from json.encoder import encode_basestring
from typing import Any, NamedTuple

from oel_jax.base.errors import UserError
from oel_jax.data.messages import Context, Message
from oel_jax.data.texts import Change, change_head, change_trajectory, change_turn
from oel_jax.data.trajectories import SCHEMA, Trajectory, Turn, altered
from oel_jax.data.trajectory_schema import decode_line, encode, present

CACHE_KIB = 32 * 1024
# (a piece without its turns, the id of an exchange of it) -> whether it is not to be kept
Forgotten = Callable[[Trajectory, str], bool]

_HEADERS = 200  # different heads that are remembered in memory

_TABLES = f"""
PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-{CACHE_KIB};
BEGIN;
CREATE TABLE nodes (node INTEGER PRIMARY KEY, parent INTEGER, next INTEGER, header INTEGER,
  key TEXT, made INTEGER, digest BLOB, hash BLOB, left INTEGER, body BLOB);
CREATE TABLE heads (node INTEGER PRIMARY KEY);
CREATE TABLE digests (digest BLOB PRIMARY KEY, node INTEGER) WITHOUT ROWID;
CREATE TABLE keys (key TEXT PRIMARY KEY, node INTEGER) WITHOUT ROWID;
CREATE TABLE headers (header INTEGER PRIMARY KEY, text TEXT UNIQUE);
CREATE TABLE names (name TEXT PRIMARY KEY, node INTEGER) WITHOUT ROWID;
CREATE TABLE feedback (number INTEGER PRIMARY KEY, node INTEGER, text TEXT, UNIQUE (node, text));
CREATE TABLE waiting (parent TEXT, line BLOB);
CREATE TABLE comments (key TEXT, text TEXT);
"""
_COLUMNS = "nodes.node, parent, next, header, nodes.key, made, nodes.digest, hash, left"
_FACTS = ("time", "sampling", "finish", "policy", "approved", "prompt_ids", "response_ids")


class _Node(NamedTuple):
    node: int
    parent: int | None
    next: int | None
    header: int
    key: str
    made: int  # 1: the key was made from the content, since no piece named this exchange
    digest: bytes  # of all that was read and answered, as it came
    hash: bytes  # the same of what is kept (redacted)
    left: int = 0  # 1: forgotten, and only here so that what continues it is, too


def canonical(message: Message) -> bytes:
    """A message as bytes that are the same for equal messages, and for no others."""
    if len(message) == 2:  # a role and a text, as most are; no other begins like this
        return f"{message['role']}\0{message['content']}".encode()
    text = json.dumps(message, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8")


class Chain:
    """Digests of a growing list of messages: that of the next one from that of the last."""

    def __init__(self, key: bytes = b"", size: int = 16) -> None:
        self._key, self._size = key, size

    def start(self, trajectory: Trajectory) -> bytes:
        """Of no messages; conversations that must not be mixed up start differently."""
        data = repr(_seed(trajectory)).encode("utf-8")
        return hashlib.blake2b(data, key=self._key, digest_size=self._size).digest()

    def step(self, before: bytes, message: Message) -> bytes:
        """Of the messages before and one more."""
        data = before + canonical(message)
        return hashlib.blake2b(data, key=self._key, digest_size=self._size).digest()


def _seed(trajectory: Trajectory) -> dict[str, Any]:
    """What two pieces of one conversation have in common, messages apart."""
    context = trajectory.context
    return {
        "user": trajectory.user,
        "conversation": trajectory.conversation,
        "purpose": trajectory.purpose,
        "wrapper": trajectory.wrapper,
        "context": None if context is None else vars(context),
        "tools": list(trajectory.tools),
    }


class Joiner:
    """Collects pieces and gives whole conversations.

        joiner = Joiner()
        for piece in pieces:
            joiner.add(piece)
        for trajectory in joiner.conversations(): ...

    Pieces are compared as they come, and kept as `change` makes them.

    Args:
        change: applied to every text before it is kept (redaction). Ids of tokens are then left
            out.
        forgotten: which exchanges are not kept, and nothing that continues them.

    Attributes:
        change, forgotten: the same; they may be set between two pieces.
        left: exchanges that were not kept since they are forgotten.
        repeated: answers that came again.
        alone: after `conversations` or `lines`: pieces that were left out, since their parent
            never came.
        unknown: the same: comments on exchanges that never came.
    """

    def __init__(self, change: Change | None = None, forgotten: Forgotten | None = None) -> None:
        self.change, self.forgotten = change, forgotten
        # The digests of unredacted texts can be compared with nothing after this process.
        self._raw, self._kept = Chain(os.urandom(32)), Chain()
        # "": a database of this process alone, on disk; the file has no name from the start.
        self._db = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._db.executescript(_TABLES)
        self._headers: dict[str, int] = {}
        self._heads: dict[int, Trajectory] = {}
        self._begins: dict[int, bytes] = {}
        self._last_node = self._marked = 0  # what was known at a mark keeps its name
        self._deep = False  # whether a first turn reads answers that are no turns themselves
        self._commented = False  # whether there is any feedback
        self.repeated = self.alone = self.unknown = self.left = 0

    # --- collect ----------------------------------------------------------------------------------

    def add(self, piece: Trajectory) -> int:
        """Take a piece; returns how many answers of it are new.

        A piece is a conversation of any length, an exchange, or a game, which stays as it is.
        """
        if piece.parent is None:
            return self._add(piece, None)
        parent = self._by_key(piece.parent)
        if parent is None:
            late = piece if self.change is None else change_trajectory(piece, self.change)
            self._run("INSERT INTO waiting VALUES (?, ?)", (late.parent, encode(late)))
            return 0
        return self._add(piece, parent)

    def comment(self, key: str, text: str) -> None:
        """Add feedback to the exchange with this id, which may come later."""
        node = self._by_key(key)
        if node is None:
            self._run("INSERT INTO comments VALUES (?, ?)", (key, text))
        else:
            self._comment(node.node, text)

    def mark(self) -> tuple[int, int]:
        """What is known now, for `lines` and `comments`."""
        self._settle()
        self._marked = self._last_node
        return self._last_node, self._one("SELECT COALESCE(MAX(number), 0) FROM feedback")[0]

    def _add(self, piece: Trajectory, parent: _Node | None) -> int:
        turns = piece.turns
        if any(not turn.continues for turn in turns[1:]) or piece.game is not None:
            return self._add_whole(piece)
        clean = piece if self.change is None else change_head(piece, self.change)
        if len(turns) == 1 and turns[0].id is None and piece.id is not None:
            turns = (altered(turns[0], id=piece.id),)
        elif len(turns) > 1 and piece.conversation is None and piece.id != turns[0].id:
            piece = altered(piece, conversation=piece.id)
            clean = altered(clean, conversation=clean.id)
        header, new, fresh = self._header(clean), 0, False
        digest = self._raw.start(piece) if parent is None else parent.digest
        kept = self._kept.start(clean) if parent is None else parent.hash
        for turn in turns:
            if parent is None:
                turn, parent, digest, kept = self._cut(turn, digest, kept)
            for message in (*turn.messages, turn.shown):
                digest = self._raw.step(digest, message)
            # What continues an answer that is new itself cannot be known.
            unknown = fresh and parent is not None and bool(parent.made) and not self._deep
            parent, fresh = self._take(turn, parent, digest, kept, header, clean, unknown)
            kept, new = parent.hash, new + fresh
        return new

    def _cut(
        self, turn: Turn, digest: bytes, kept: bytes
    ) -> tuple[Turn, _Node | None, bytes, bytes]:
        """A turn without those first messages that are a known conversation."""
        found, so_far = None, digest
        for at, message in enumerate(turn.messages[:-1], 1):
            so_far = self._raw.step(so_far, message)
            node = self._by_digest(so_far) if message["role"] == "assistant" else None
            if node is not None:
                found = node, at
        if found is None:
            roles = {message["role"] for message in turn.messages}
            self._deep = self._deep or "assistant" in roles
            return turn, None, digest, kept
        node, at = found
        shorter = replace(turn, messages=turn.messages[at:], continues=True, kept_ids=0)
        return shorter, node, node.digest, node.hash

    def _take(
        self,
        turn: Turn,
        parent: _Node | None,
        digest: bytes,
        kept: bytes,
        header: int,
        clean: Trajectory,
        unknown: bool,
    ) -> tuple[_Node, bool]:
        """The node of a turn, and whether it is new; `unknown`: it is for sure."""
        known = None if unknown else self._by_digest(digest)
        if known is not None and (known.made or turn.id in (None, known.key)):
            return self._again(known, turn), False
        if self.change is not None:
            turn = change_turn(turn, self.change)
        for message in (*turn.messages, turn.shown):
            kept = self._kept.step(kept, message)
        key = _made_key(clean, kept)
        made = turn.id in (None, key)
        known = None if unknown else self._by_digest(kept)
        if known is not None and not (known.made or turn.id in (None, known.key)):
            known = None
        if known is None:
            key = key if made else turn.id
            known = self._claimed(key)
            if known is not None and known.hash != kept:  # another exchange under the same name
                key, made = f"{key}#{kept.hex()[:12]}", True
                known = self._claimed(key)
        if known is not None:
            self._alias(digest, known.node)
            return self._again(known, turn), False
        node = self._insert(turn, parent, digest, kept, header, key, made, clean)
        return node, not node.left

    def _again(self, node: _Node, turn: Turn) -> _Node:
        """A known exchange came again: it may bring its name, facts and feedback."""
        if node.left:
            self.left += 1
            return node
        self.repeated += 1
        if turn.feedback is not None:
            text = turn.feedback if self.change is None else self.change(turn.feedback)
            self._comment(node.node, text)
        if turn.id is not None and node.made and turn.id != node.key:
            if self._claimed(turn.id, node.node) is None and node.node > self._marked:
                # It is known by its own name from now on.
                self._run("UPDATE nodes SET key=?, made=0 WHERE node=?", (turn.id, node.node))
                node = node._replace(key=turn.id, made=0)
            body = json.loads(self._body(node.node))
            ids = ("prompt_ids", "response_ids") if self.change is not None else ()
            facts = present(turn)
            new = {k: facts[k] for k in _FACTS if k in facts and k not in body and k not in ids}
            if turn.kept_ids:  # then the prompt's ids are not whole
                new = {k: v for k, v in new.items() if not k.endswith("_ids")}
            if new:
                self._run("UPDATE nodes SET body=? WHERE node=?", (_dump(body | new), node.node))
        return node

    def _insert(
        self,
        turn: Turn,
        parent: _Node | None,
        digest: bytes,
        kept: bytes,
        header: int,
        key: str,
        made: bool,
        clean: Trajectory,
    ) -> _Node:
        self._last_node += 1
        above = None if parent is None else parent.node
        left = (parent is not None and parent.left) or self._is_left(clean, key)
        node = _Node(self._last_node, above, None, header, key, int(made), digest, kept, int(left))
        body = None if left else _dump(present(altered(turn, id=None, feedback=None)))
        self._insert_node(node, body)
        self._alias(digest, node.node)
        self._alias(kept, node.node)
        if left:
            self.left += 1
            return node
        if turn.feedback is not None:
            self._comment(node.node, turn.feedback)
        longer = parent is not None and (
            header == parent.header or _seed(self._head(parent.header)) == _seed(clean)
        )
        claim = "UPDATE nodes SET next=? WHERE node=? AND next IS NULL"
        if not (longer and self._run(claim, (node.node, above)).rowcount):
            self._run("INSERT INTO heads VALUES (?)", (node.node,))
            name = clean.conversation or key
            self._run("INSERT OR IGNORE INTO names VALUES (?, ?)", (name, node.node))
        return node

    def _add_whole(self, piece: Trajectory) -> int:
        """A trajectory whose turns do not continue each other stays as it is."""
        if piece.id is None:
            name = "/".join(str(part) for part in piece.key if part is not None)
            piece = replace(piece, id=name, game=None, seed=None)
        if self.change is not None:
            turns = tuple(change_turn(turn, self.change) for turn in piece.turns)
            piece = replace(change_head(piece, self.change), turns=turns)
        line = encode(piece)
        digest = hashlib.sha256(line).digest()
        known = self._by_key(piece.id)
        if known is not None and known.digest == digest:
            self.repeated += len(piece.turns)
            return 0
        if known is not None:
            piece = replace(piece, id=f"{piece.id}#{digest.hex()[:12]}")
            line = encode(piece)
            if self._by_key(piece.id) is not None:
                self.repeated += len(piece.turns)
                return 0
        self._last_node += 1
        left = self._is_left(piece, piece.id)
        node = _Node(self._last_node, None, None, 0, piece.id, 0, digest, digest, int(left))
        self._insert_node(node, None if left else line)
        self._run("INSERT INTO keys VALUES (?, ?)", (piece.id, node.node))
        if left:
            self.left += len(piece.turns)
            return 0
        self._run("INSERT INTO heads VALUES (?)", (node.node,))
        return len(piece.turns)

    def _is_left(self, clean: Trajectory, key: str) -> bool:
        return self.forgotten is not None and self.forgotten(clean, key)

    def _insert_node(self, node: _Node, body: bytes | None) -> None:
        self._run("INSERT INTO nodes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (*node, body))

    def _settle(self) -> None:
        """Add what waited for its parent, and feedback that waited for its exchange."""
        found = True
        while found:
            rows = self._run(
                "SELECT waiting.rowid, line FROM waiting JOIN keys ON parent = key LIMIT 1000"
            ).fetchall()
            for number, line in rows:
                self._run("DELETE FROM waiting WHERE rowid=?", (number,))
                self.add(decode_line(line))
            found = bool(rows)
        self.alone = self._one("SELECT COUNT(*) FROM waiting")[0]
        self._commented = self._commented or self._one("SELECT 1 FROM comments") is not None
        self._run(
            "INSERT OR IGNORE INTO feedback (node, text) "
            "SELECT node, text FROM comments JOIN keys USING (key) ORDER BY comments.rowid"
        )
        self._run("DELETE FROM comments WHERE key IN (SELECT key FROM keys)")
        self.unknown = self._one("SELECT COUNT(*) FROM comments")[0]

    # --- give -------------------------------------------------------------------------------------

    def conversations(self) -> Iterator[Trajectory]:
        """Whole conversations, ordered by where each began.

        Each has an `id`: that of the conversation if a source named one, else that of its first
        exchange. Its turns have the ids of their exchanges, and `feedback` where there is some.
        """
        self._settle()
        for (head,) in self._run("SELECT node FROM heads ORDER BY node"):
            yield self._conversation(self._node(head))

    def _conversation(self, first: _Node) -> Trajectory:
        if not first.header:
            return self._whole(first)
        head = self._head(first.header)
        turns, node = [self._beginning(first, head)], first
        while node.next is not None:
            node = self._node(node.next)
            turns.append(self._turn(node, head))
        name = head.conversation or first.key
        owner = self._one("SELECT node FROM names WHERE name=?", name)
        identity = name if owner and owner[0] == first.node else first.key
        return replace(head, id=identity, turns=tuple(turns))

    def _whole(self, node: _Node) -> Trajectory:
        whole = decode_line(self._body(node.node))
        comments = self._feedback(node.node)
        if comments is None:
            return whole
        last = whole.turns[-1]
        text = "\n".join(filter(None, (last.feedback, comments)))
        return replace(whole, turns=(*whole.turns[:-1], replace(last, feedback=text)))

    def _beginning(self, first: _Node, head: Trajectory) -> Turn:
        """The first turn with all messages and ids that it read."""
        turn = self._turn(first, head)
        if first.parent is None:
            return turn
        above, node = [], first
        while node.parent is not None and turn.continues:
            node = self._node(node.parent)
            above.append(self._turn(node, head))
        messages: list[Message] = []
        ids: tuple[int, ...] = ()
        for one in reversed(above):
            messages += [*one.messages, one.shown]
            prompt = () if one.prompt_ids is None else (*ids[: one.kept_ids], *one.prompt_ids)
            ids = (*prompt, *(one.response_ids or ()))
        whole = None if turn.prompt_ids is None else (*ids[: turn.kept_ids], *turn.prompt_ids)
        return replace(
            turn,
            messages=(*messages, *turn.messages),
            continues=False,
            kept_ids=0,
            prompt_ids=whole,
        )

    def _turn(self, node: _Node, head: Trajectory, body: bytes | None = None) -> Turn:
        turn = Turn(**json.loads(self._body(node.node) if body is None else body))
        policy = turn.policy or self._head(node.header).policy
        return altered(
            turn,
            id=node.key,
            feedback=self._feedback(node.node),
            policy=None if policy == head.policy else policy,
        )

    def lines(self, after: tuple[int, int] = (0, 0)) -> Iterator[tuple[bytes, int]]:
        """What is known since a mark, as lines of a store: (line, number of its answers).

        A line is a piece of one turn, after that of its parent, or what `add` took as it was. It is
        put together from the JSON that is kept, without being read again.
        """
        self._settle()
        rows = self._run(
            "SELECT header, key, body, node, "
            "(SELECT key FROM nodes AS above WHERE node=nodes.parent) "
            "FROM nodes WHERE node > ? AND NOT left ORDER BY node",
            (after[0],),
        )
        for header, key, body, node, parent in rows:
            if not header:
                whole = self._whole(self._node(node))
                yield encode(whole), len(whole.turns)
                continue
            comments = self._feedback(node)
            if comments is not None:
                body = _dump(json.loads(body) | {"feedback": comments})
            names = f'"id":{encode_basestring(key)}'
            if parent is not None:
                names += f',"parent":{encode_basestring(parent)}'
            begin = self._begin_of_line(header)
            yield b'%b,%b,"turns":[%b]}\n' % (begin, names.encode(), body), 1

    def _begin_of_line(self, header: int) -> bytes:
        """The head of a line as JSON, without the brace that ends it."""
        begin = self._begins.get(header)
        if begin is None:
            head = self._head(header)
            record = {"schema": SCHEMA, **present(head)}
            if head.context is not None:
                record["context"] = vars(head.context)
            del record["turns"]
            begin = _dump(record)[:-1]
            if len(self._begins) >= _HEADERS:
                self._begins.clear()
            self._begins[header] = begin
        return begin

    def comments(self, after: tuple[int, int]) -> Iterator[tuple[str, str]]:
        """(id of an exchange that was known at a mark, feedback that came since)."""
        self._settle()
        yield from self._run(
            "SELECT key, text FROM feedback JOIN nodes USING (node) "
            "WHERE number > ? AND node <= ? ORDER BY number",
            (after[1], after[0]),
        )

    def families(self) -> Iterator[tuple[int, str, Trajectory]]:
        """(family, id, its piece without messages) of every exchange, each after its parent.

        Exchanges that continue one another, in whatever branch, are of one family.
        """
        self._settle()
        families = array("q", [0])  # by number of the exchange
        for node, above, header, key in self._run(
            "SELECT node, parent, header, key FROM nodes ORDER BY node"
        ):
            families.append(node if above is None else families[above])
            whole = None if header else decode_line(self._body(node))
            yield families[node], key, self._head(header) if header else replace(whole, turns=())

    def counts(self, after: tuple[int, int] = (0, 0)) -> tuple[int, int, int]:
        """Since a mark: (conversations, answers that continue one, answers with feedback)."""
        began = self._one("SELECT COUNT(*) FROM heads WHERE node > ?", after[0])[0]
        longer = self._one(
            "SELECT COUNT(*) FROM nodes WHERE node > ? AND NOT left AND node NOT IN heads", after[0]
        )[0]
        told = self._one("SELECT COUNT(DISTINCT node) FROM feedback WHERE number > ?", after[1])[0]
        return began, longer, told

    def users(self) -> int:
        """How many users are named."""
        return self._one("SELECT COUNT(DISTINCT json_extract(text, '$.user')) FROM headers")[0]

    # --- tables -----------------------------------------------------------------------------------

    def _run(self, query: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        try:
            return self._db.execute(query, values)
        except sqlite3.OperationalError as error:
            raise UserError(
                f"conversations cannot be put together ({error}); make room in the directory for "
                "temporary files, or name another in the environment variable SQLITE_TMPDIR"
            ) from error

    def _one(self, query: str, *values: Any) -> Any:
        return self._run(query, values).fetchone()

    def _node(self, number: int) -> _Node:
        return _Node(*self._one(f"SELECT {_COLUMNS} FROM nodes WHERE node=?", number))

    def _by_digest(self, digest: bytes) -> _Node | None:
        row = self._one(
            f"SELECT {_COLUMNS} FROM digests JOIN nodes USING (node) WHERE digests.digest=?", digest
        )
        return None if row is None else _Node(*row)

    def _by_key(self, key: str) -> _Node | None:
        row = self._one(
            f"SELECT {_COLUMNS} FROM keys JOIN nodes USING (node) WHERE keys.key=?", key
        )
        return None if row is None else _Node(*row)

    def _claimed(self, key: str, node: int | None = None) -> _Node | None:
        """Who has an id; if nobody, a node has it now: if none is given the next one to insert."""
        claim = "INSERT OR IGNORE INTO keys VALUES (?, ?)"
        if self._run(claim, (key, self._last_node + 1 if node is None else node)).rowcount:
            return None
        return self._by_key(key)

    def _alias(self, digest: bytes, node: int) -> None:
        self._run("INSERT OR REPLACE INTO digests VALUES (?, ?)", (digest, node))

    def _body(self, node: int) -> bytes:
        return self._one("SELECT body FROM nodes WHERE node=?", node)[0]

    def _comment(self, node: int, text: str) -> None:
        self._commented = True
        self._run("INSERT OR IGNORE INTO feedback (node, text) VALUES (?, ?)", (node, text))

    def _feedback(self, node: int) -> str | None:
        if not self._commented:
            return None
        rows = self._run("SELECT text FROM feedback WHERE node=? ORDER BY number", (node,))
        return "\n".join(text for (text,) in rows) or None

    def _header(self, clean: Trajectory) -> int:
        """The number of what all turns of a piece have in common."""
        record: dict[str, Any] = _seed(clean) | {"policy": clean.policy, "round": clean.round}
        record |= {"chain": clean.chain, "outcome": clean.outcome}
        text = json.dumps({name: value for name, value in record.items() if value is not None})
        number = self._headers.get(text)
        if number is None:
            self._run("INSERT OR IGNORE INTO headers (text) VALUES (?)", (text,))
            number = self._one("SELECT header FROM headers WHERE text=?", text)[0]
            if len(self._headers) >= _HEADERS:
                self._headers.clear()
            self._headers[text] = number
        return number

    def _head(self, number: int) -> Trajectory:
        if number in self._heads:
            return self._heads[number]
        record = json.loads(self._one("SELECT text FROM headers WHERE header=?", number)[0])
        if "context" in record:
            record["context"] = Context(**record["context"])
        if len(self._heads) >= _HEADERS:
            self._heads.clear()
        self._heads[number] = Trajectory(turns=(), **record)
        return self._heads[number]


def _made_key(clean: Trajectory, kept: bytes) -> str:
    """The id of an exchange that no source names: the same whenever it is read again."""
    begin = "log" if clean.conversation is None else clean.conversation
    return f"{begin}#{kept.hex()[:24]}"


def _dump(record: Any) -> bytes:
    return _COMPACT(record).encode("utf-8")


_COMPACT = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
