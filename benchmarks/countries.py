"""How the demo's `countries.json` was made: `pip install countryinfo==1.0.1 && python benchmarks/countries.py`.

The demo ships the small JSON and not the package, so that it needs nothing beyond selsft's own dependencies. Outdated
facts of countryinfo 1.0.1 and capitals whose status is disputed are left out: a demo about wrong answers should not
contain one by accident. Nothing is added by hand.
"""

from __future__ import annotations

import json
from pathlib import Path

TARGET = Path(__file__).parents[1] / "selsft" / "demo" / "countries.json"
COUNTRIES = 120

# Not a state of its own today, or a record that describes two at once.
SKIPPED = {"Serbia and Montenegro", "Hong Kong", "Puerto Rico", "Macau", "Western Sahara"}

# (country, attribute): true once, or disputed.
STALE = {
    ("Kazakhstan", "capital"),  # Astana again since 2022
    ("Burundi", "capital"),  # Gitega since 2019
    ("Sri Lanka", "capital"),  # Colombo is the commercial one
    ("Israel", "capital"),
    ("Palestine", "capital"),
    ("Zambia", "currency"),  # ZMW since 2013
    ("Belarus", "currency"),  # BYN since 2016
    ("Mauritania", "currency"),  # MRU since 2017
    ("Venezuela", "currency"),  # VES since 2018
    ("Sierra Leone", "currency"),  # SLE since 2022
    ("Croatia", "currency"),  # EUR since 2023
    ("Zimbabwe", "currency"),  # ZWG since 2024
    ("Bulgaria", "currency"),  # EUR since 2026
}

WITH_ARTICLE = {
    "Central African Republic",
    "Czech Republic",
    "Democratic Republic of the Congo",
    "Dominican Republic",
    "Netherlands",
    "Philippines",
    "Republic of the Congo",
    "United Arab Emirates",
    "United Kingdom",
    "United States",
}
RENAMED = {"Washington D.C.": "Washington"}  # the dot would end the answer


def facts_of(record: dict) -> dict[str, str]:
    """The attributes of one countryinfo record that have exactly one plain value."""
    name = record["name"]
    facts = {"name": f"the {name}" if name in WITH_ARTICLE else name}
    domains = [d for d in record.get("tld") or [] if d.isascii()]
    candidates = {
        "capital": [RENAMED.get(record.get("capital", ""), record.get("capital"))],
        "currency": record.get("currencies") or [],
        "demonym": [record.get("demonym")],
        "domain": domains,
        "calling_code": [f"+{code}" for code in record.get("callingCodes") or []],
    }
    for attribute, values in candidates.items():
        plain = len(values) == 1 and values[0] and not set(values[0]) & set("/,")
        if plain and (name, attribute) not in STALE:
            facts[attribute] = values[0]
    return facts


def main() -> None:
    import countryinfo

    folder = Path(countryinfo.__file__).parent / "data"
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    records = [r for r in records if r.get("population") and r["name"] not in SKIPPED]
    records.sort(key=lambda r: (-r["population"], r["name"]))
    rows = [facts_of(record) for record in records[:COUNTRIES]]
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    TARGET.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    print(f"{len(rows)} countries, {sum(len(row) - 1 for row in rows)} facts -> {TARGET}")


if __name__ == "__main__":
    main()
