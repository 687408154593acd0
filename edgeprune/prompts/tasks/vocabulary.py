"""Names, places, objects and words from which the tasks are written."""

MALE_NAMES = (
    "Adam", "Alan", "Andrew", "Anthony", "Arthur", "Ben", "Brian", "Carl", "Charles", "Chris",
    "Daniel", "David", "Dennis", "Edward", "Eric", "Frank", "Fred", "Gary", "George", "Greg",
    "Harry", "Henry", "Howard", "Ian", "Jack", "Jacob", "James", "Jason", "Jeff", "Jim", "John",
    "Joseph", "Kevin", "Larry", "Luke", "Mark", "Martin", "Matthew", "Michael", "Nick", "Oliver",
    "Patrick", "Paul", "Peter", "Philip", "Ray", "Richard", "Robert", "Simon", "Steve", "Thomas",
    "Tim", "Tom", "Tony", "Victor", "Walter", "William",
)  # fmt: skip

FEMALE_NAMES = (
    "Alice", "Amanda", "Amy", "Andrea", "Angela", "Anna", "Anne", "Barbara", "Betty", "Carol",
    "Caroline", "Catherine", "Christine", "Claire", "Clara", "Diana", "Donna", "Dorothy",
    "Elizabeth", "Ellen", "Emily", "Emma", "Eva", "Grace", "Hannah", "Helen", "Irene", "Jane",
    "Jennifer", "Jessica", "Joan", "Julia", "Julie", "Karen", "Kate", "Laura", "Linda", "Lisa",
    "Louise", "Lucy", "Margaret", "Maria", "Martha", "Mary", "Michelle", "Nancy", "Nicole",
    "Olivia", "Rachel", "Rebecca", "Rose", "Ruth", "Sandra", "Sarah", "Sophie", "Susan", "Victoria",
)  # fmt: skip

PLACES = (
    "airport", "bakery", "bank", "beach", "bridge", "cafe", "church", "cinema", "farm", "garden",
    "harbor", "hospital", "hotel", "house", "library", "market", "museum", "office", "park",
    "restaurant", "river", "school", "station", "store", "theater", "village",
)  # fmt: skip

OBJECTS = (
    "ball", "basket", "bike", "book", "bottle", "box", "cake", "camera", "card", "coat", "cup",
    "drink", "flower", "gift", "glass", "guitar", "hat", "key", "lamp", "letter", "map", "necklace",
    "newspaper", "paper", "pen", "phone", "picture", "ring", "sandwich", "ticket", "toy", "watch",
)  # fmt: skip

EVENTS = (
    "alliance", "battle", "campaign", "conflict", "construction", "crisis", "dispute", "drought",
    "expedition", "famine", "journey", "negotiation", "occupation", "project", "rebellion",
    "reform", "reign", "revolt", "siege", "strike", "study", "treaty", "voyage", "war",
)  # fmt: skip

ADJECTIVES = (
    "brave", "clever", "friendly", "funny", "good", "great", "kind", "nice", "smart", "strong",
    "talented", "wonderful",
)  # fmt: skip

ROLES = (
    "baker", "cook", "dancer", "doctor", "driver", "farmer", "friend", "leader", "neighbor",
    "painter", "person", "singer", "student", "swimmer", "teacher", "writer",
)  # fmt: skip

WORDS = (
    "apple", "arrow", "autumn", "bear", "bell", "bird", "boat", "bread", "brick", "brush",
    "butter", "candle", "castle", "chain", "chair", "cheese", "circle", "cloud", "coffee", "corner",
    "cotton", "crown", "desk", "diamond", "dog", "door", "dream", "dust", "eagle", "earth",
    "engine", "evening", "feather", "field", "finger", "fire", "fish", "floor", "forest", "fruit",
    "gold", "grass", "hammer", "heart", "horse", "ice", "iron", "island", "jacket", "kitchen",
    "knife", "ladder", "lake", "leaf", "lemon", "light", "lion", "machine", "metal", "milk",
    "mirror", "monkey", "moon", "morning", "mountain", "mouse", "music", "needle", "night", "ocean",
    "orange", "paint", "pepper", "pillow", "planet", "plate", "pocket", "queen", "rain", "road",
    "rock", "roof", "root", "salt", "sand", "shadow", "sheep", "shirt", "silver", "smoke", "snow",
    "soap", "spoon", "spring", "star", "stone", "storm", "street", "sugar", "summer", "sun",
    "table", "tiger", "tower", "tree", "valley", "wall", "water", "wheel", "wind", "window",
    "winter", "wolf", "wood",
)  # fmt: skip
"""The words of the induction tasks; none is a place or an object of the other tasks."""
