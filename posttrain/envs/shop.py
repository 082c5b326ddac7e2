"""A shop's back office: a customer asks for changes, tools act on the shop's database, its final state decides.

As in tau-bench (arXiv 2406.12045): success is a database equal to the one that the right actions leave behind, not
a text. Every request names people and goods, never numbers, so that the agent must look things up; doing
more than was asked fails as well. Difficulty: `actions` changes per request, `customers` in the database.
Used as tasks = "py://posttrain.envs.shop:tasks?n=1000&actions=2", environment = "posttrain.envs.shop:start",
rewards = [{ fn = "posttrain.rewards.tools:state" }]. Next: database.py.
"""

from collections.abc import Iterator, Sequence
from random import Random
from typing import Annotated, Any

from pydantic import Field

from posttrain.envs import database
from posttrain.rollouts import toolbox
from posttrain.rollouts.deepseek_chat import Call
from posttrain.rollouts.environment import Policy, play
from posttrain.rollouts.toolbox import ToolError
from posttrain.schema import Message, Task

MAX_TURNS = 20
POLICY = (
    "You work in the back office of a shop and act with tools on its database. Do exactly what the customer asks, "
    "nothing else. Orders can be changed or cancelled while they are pending; a delivered order can be refunded "
    "once. When everything is done, answer with the word done."
)
_SCHEMA = """
CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT, email TEXT, city TEXT);
CREATE TABLE products (id INTEGER PRIMARY KEY, name TEXT, category TEXT, price INTEGER, stock INTEGER);
CREATE TABLE orders (id INTEGER PRIMARY KEY, customer INTEGER, status TEXT, address TEXT, refunded INTEGER);
CREATE TABLE items (order_id INTEGER, product INTEGER, quantity INTEGER);
"""
_FIRST = (
    "Ada Ben Cleo Dan Eva Finn Gina Hugo Iris Jon Kira Leo Mona Nils Olga Paul Rosa Sven Tara Udo".split()
)
_LAST = (
    "Abel Brand Costa Dietz Ericson Fabre Gomez Holm Ito Jansen Klein Lund Marin Novak Olsen Peters".split()
)
_CITIES = "Aarhus Bergen Coimbra Dresden Essen Florence Ghent Haarlem Imola Jena".split()
_STREETS = "Oak Street, Mill Lane, Station Road, Harbour Way, Church Square, Garden Row".split(", ")
_GOODS = {
    "lamp": ("desk lamp", "floor lamp", "reading lamp", "night light"),
    "chair": ("office chair", "stool", "armchair", "folding chair"),
    "bag": ("backpack", "tote bag", "travel bag", "laptop sleeve"),
    "kitchen": ("kettle", "toaster", "frying pan", "bread knife"),
}

OrderId = Annotated[int, Field(description="number of an order")]
ProductId = Annotated[int, Field(description="number of a product")]


class Shop:
    """One episode: a database of its own and the tools on it."""

    def __init__(self, *, seed: int, customers: int) -> None:
        self.db = database.build(_SCHEMA, _rows(seed, customers))
        self.calls = 0

    def query(self, sql: Annotated[str, Field(description="one SELECT statement of SQLite")]) -> str:
        """Read from the tables customers, products, orders and items. At most 50 rows are shown."""
        return database.select(self.db, sql)

    def cancel_order(self, order_id: OrderId) -> str:
        """Cancel a pending order; its goods go back into stock."""
        self._order(order_id, "pending")
        for product, quantity in self._items(order_id):
            self._move(product, quantity)
        self.db.execute("UPDATE orders SET status = 'cancelled' WHERE id = ?", (order_id,))
        return f"order {order_id} is cancelled"

    def change_address(self, order_id: OrderId, address: Annotated[str, Field(max_length=100)]) -> str:
        """Send a pending order to another address: street with number, then the city."""
        self._order(order_id, "pending")
        self.db.execute("UPDATE orders SET address = ? WHERE id = ?", (address.strip(), order_id))
        return f"order {order_id} goes to {address.strip()}"

    def set_quantity(
        self, order_id: OrderId, product_id: ProductId, quantity: Annotated[int, Field(ge=1, le=99)]
    ) -> str:
        """Order more or less of a product that is in a pending order."""
        self._order(order_id, "pending")
        self._move(product_id, self._quantity(order_id, product_id) - quantity)
        self.db.execute(
            "UPDATE items SET quantity = ? WHERE order_id = ? AND product = ?",
            (quantity, order_id, product_id),
        )
        return f"order {order_id} has {quantity} of product {product_id}"

    def exchange_product(self, order_id: OrderId, product_id: ProductId, new_product_id: ProductId) -> str:
        """Put another product in the place of one that is in a pending order, as many of it."""
        self._order(order_id, "pending")
        quantity = self._quantity(order_id, product_id)
        if any(product == new_product_id for product, _ in self._items(order_id)):
            raise ToolError(f"product {new_product_id} is already in order {order_id}")
        self._move(new_product_id, -quantity)
        self._move(product_id, quantity)
        self.db.execute(
            "UPDATE items SET product = ? WHERE order_id = ? AND product = ?",
            (new_product_id, order_id, product_id),
        )
        return f"order {order_id} has product {new_product_id} instead of {product_id}"

    def refund_order(self, order_id: OrderId) -> str:
        """Pay a delivered order back."""
        if self._order(order_id, "delivered"):
            raise ToolError(f"order {order_id} has been refunded before")
        self.db.execute("UPDATE orders SET refunded = 1 WHERE id = ?", (order_id,))
        return f"order {order_id} is refunded"

    def step(self, text: str) -> list[str] | None:
        """As Episode.step."""
        results = toolbox.respond(_tools(self), text)
        self.calls += len(results or ())
        return results

    def outcome(self) -> dict[str, Any]:
        """The state of the database as a hash, and the calls made."""
        return {"state": database.digest(self.db), "calls": self.calls}

    def close(self) -> None:
        """Free the database."""
        self.db.close()

    def _order(self, order_id: int, status: str) -> bool:
        """Whether the order was refunded; refuses an order that is not of this status."""
        found = self.db.execute("SELECT status, refunded FROM orders WHERE id = ?", (order_id,)).fetchone()
        if found is None:
            raise ToolError(f"there is no order {order_id}")
        if found[0] != status:
            raise ToolError(f"order {order_id} is {found[0]}, not {status}")
        return bool(found[1])

    def _items(self, order_id: int) -> list[tuple[int, int]]:
        return self.db.execute(
            "SELECT product, quantity FROM items WHERE order_id = ?", (order_id,)
        ).fetchall()

    def _quantity(self, order_id: int, product_id: int) -> int:
        quantities = dict(self._items(order_id))
        if product_id not in quantities:
            raise ToolError(f"order {order_id} has no product {product_id}")
        return quantities[product_id]

    def _move(self, product_id: int, quantity: int) -> None:
        """Change a product's stock."""
        found = self.db.execute("SELECT stock FROM products WHERE id = ?", (product_id,)).fetchone()
        if found is None:
            raise ToolError(f"there is no product {product_id}")
        if found[0] + quantity < 0:
            raise ToolError(f"only {found[0]} of product {product_id} in stock")
        self.db.execute("UPDATE products SET stock = stock + ? WHERE id = ?", (quantity, product_id))


def start(task: Task, seed: int) -> Shop:
    """An episode of the task; nothing in it is random, so the seed is not needed."""
    return Shop(seed=task.meta["shop"], customers=task.meta["customers"])


def tasks(*, seed: int, n: int, actions: int = 1, customers: int = 8) -> Iterator[Task]:
    """n requests with this many changes each; raises ValueError for settings that give none."""
    if not 1 <= actions <= customers <= len(_FIRST):
        raise ValueError(
            f"actions={actions}, customers={customers}: need 1 <= actions <= customers <= {len(_FIRST)}"
        )
    rng = Random(seed)
    for _ in range(n):
        yield _task(rng.randrange(2**32), actions, customers)


def solver(task: Task) -> Policy:
    """The calls that do what is asked, after looking the numbers up."""
    return toolbox.script([Call(name, arguments) for name, arguments in task.meta["solution"]], "done")


def demonstrate(task: Task, rng: Random) -> list[Message]:
    """The solver's conversation, for a first supervised training."""
    return list(play(start, task, solver(task), seed=0, max_turns=MAX_TURNS).messages)


def _tools(shop: Shop) -> Sequence[toolbox.Function]:
    changes = (
        shop.cancel_order,
        shop.change_address,
        shop.set_quantity,
        shop.exchange_product,
        shop.refund_order,
    )
    return (shop.query, *changes)


def _task(seed: int, actions: int, customers: int) -> Task:
    """A shop and requests of different customers' orders, carried out on a copy to know the final state."""
    rng, shop = Random(seed), Shop(seed=seed, customers=customers)
    texts: list[str] = []
    calls: list[tuple[str, dict[str, Any]]] = []
    for customer in rng.sample(range(1, customers + 1), actions):
        text, lookup, name, arguments = _request(shop, customer, rng)
        texts.append(text)
        calls += [("query", {"sql": lookup}), (name, arguments)]
        getattr(shop, name)(**arguments)
    goal = database.digest(shop.db)
    system = {"role": "system", "content": POLICY, "tools": toolbox.schemas(*_tools(shop))}
    shop.close()
    return Task(
        id="",
        domain="",
        messages=(system, {"role": "user", "content": " ".join(texts)}),
        meta={"shop": seed, "customers": customers, "goal": goal, "solution": calls},
    )


def _request(shop: Shop, customer: int, rng: Random) -> tuple[str, str, str, dict[str, Any]]:
    """What a customer asks for, the query that finds the numbers, and the right call.

    Every customer has one pending and one delivered order.
    """
    name, email = shop.db.execute("SELECT name, email FROM customers WHERE id = ?", (customer,)).fetchone()
    pending, delivered = (
        shop.db.execute(
            "SELECT id FROM orders WHERE customer = ? AND status = ?", (customer, status)
        ).fetchone()[0]
        for status in ("pending", "delivered")
    )
    product, quantity = rng.choice(shop._items(pending))
    title, category = shop.db.execute(
        "SELECT name, category FROM products WHERE id = ?", (product,)
    ).fetchone()
    who = f"I am {name}, {email}."
    lookup = (
        "SELECT orders.id, status, products.id, products.name, quantity FROM customers JOIN orders ON customer = "
        "customers.id JOIN items ON order_id = orders.id JOIN products ON product = products.id "
        f"WHERE email = '{email}'"
    )
    others = shop.db.execute(
        "SELECT id, name FROM products WHERE category = ? AND id NOT IN (SELECT product FROM items WHERE order_id = ?) "
        "AND stock >= ? ORDER BY price",
        (category, pending, quantity),
    ).fetchall()
    kind = rng.choice(("cancel", "address", "quantity", "exchange" if others else "cancel", "refund"))
    if kind == "cancel":
        return f"{who} Please cancel my pending order.", lookup, "cancel_order", {"order_id": pending}
    if kind == "refund":
        text = f"{who} I want my money back for the order that was delivered."
        return text, lookup, "refund_order", {"order_id": delivered}
    if kind == "address":
        address = f"{rng.choice(_STREETS)} {rng.randint(1, 99)}, {rng.choice(_CITIES)}"
        text = f"{who} Please send my pending order to this address: {address}."
        return text, lookup, "change_address", {"order_id": pending, "address": address}
    if kind == "quantity":
        text = f"{who} In my pending order, make that {quantity + 1} of the {title}."
        arguments = {"order_id": pending, "product_id": product, "quantity": quantity + 1}
        return text, lookup, "set_quantity", arguments
    text = (
        f"{who} In my pending order, replace the {title} by the cheapest other {category} article in stock."
    )
    arguments = {"order_id": pending, "product_id": product, "new_product_id": others[0][0]}
    return text, lookup, "exchange_product", arguments


def _rows(seed: int, customers: int) -> dict[str, Sequence[tuple[object, ...]]]:
    rng = Random(f"shop {seed}")
    people = [
        (i, f"{first} {last}", f"{first}.{last}@example.com".lower(), rng.choice(_CITIES))
        for i, (first, last) in enumerate(
            zip(rng.sample(_FIRST, customers), rng.choices(_LAST, k=customers)), start=1
        )
    ]
    titles = [(title, category) for category, titles in _GOODS.items() for title in titles]
    prices = rng.sample(range(5, 200), len(titles))
    goods = [
        (i, title, category, price, rng.randint(5, 60))
        for i, ((title, category), price) in enumerate(zip(titles, prices), start=1)
    ]
    orders: list[tuple[object, ...]] = []
    items: list[tuple[object, ...]] = []
    states = ["pending", "delivered", "shipped"]
    places = [(person[0], status) for person in people for status in states[: rng.randint(2, 3)]]
    rng.shuffle(places)
    for number, (person, status) in enumerate(places, start=101):
        address = f"{rng.choice(_STREETS)} {rng.randint(1, 99)}, {rng.choice(_CITIES)}"
        orders.append((number, person, status, address, 0))
        chosen = rng.sample(range(1, len(goods) + 1), rng.randint(1, 3))
        items += [(number, product, rng.randint(1, 3)) for product in chosen]
    return {"customers": people, "products": goods, "orders": orders, "items": items}
